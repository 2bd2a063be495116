"""Checkpoints into models, and other programs' checkpoints into ours."""
