"""Metrics of a run: what its operations measured, and the user's own numbers beside it."""
