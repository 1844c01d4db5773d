"""Holds: a run that stands still, by its owner's word or because it waits for it."""
