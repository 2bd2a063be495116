"""Tasks: what is trained and evaluated."""
