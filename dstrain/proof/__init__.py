"""Proofs on the user's own runs and recipes: replaying a step, verifying a resume, accounting for every row."""
