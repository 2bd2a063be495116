"""Recipes: what to train, as strict and typed YAML."""
