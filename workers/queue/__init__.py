"""Torch-free: the journal of a run, its futures, and the Celery application that rings its doorbell."""
