"""What people see of a run: status, logs, progress."""
