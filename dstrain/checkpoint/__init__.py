"""Checkpoints without topology: fragments, an atomic commit, verification, export."""
