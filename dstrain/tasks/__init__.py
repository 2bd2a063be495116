"""Tasks: what is trained, evaluated and predicted."""
