"""Futures: reading, waiting for, cancelling operations."""
