"""Serving: a trained model over HTTP, many requests in one batch, none lost when it stops."""
