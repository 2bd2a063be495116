"""Objectives of pretraining, a file each."""
