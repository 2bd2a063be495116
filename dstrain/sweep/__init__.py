"""Sweeps: many runs of one recipe, each with other values of some keys, towards the best metric."""
