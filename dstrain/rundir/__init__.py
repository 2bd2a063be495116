"""What lies in a run's folder: attempts, timings, heartbeats, goodput; and how it is made ready."""
