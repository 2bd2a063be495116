"""A trained model in use, without its recipe: predictions, search, thresholds, monitoring. No task imports it."""
