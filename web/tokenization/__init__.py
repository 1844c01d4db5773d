"""Tokenizing for a run, answered by the web tier and never queued behind a training step."""
