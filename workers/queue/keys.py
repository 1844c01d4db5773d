"""Names in Redis: every key of ours begins with "sig:", and a run's keys share one hash tag."""

from __future__ import annotations

COMMITS = "sig:commits"
DONE = "sig:done"
POOL = "sig:pool"
RUNS = "sig:runs"
GAPS = "sig:gaps"
DEADLINES = "sig:deadlines"


def prefix(run_id: str) -> str:
    """Prefix of all keys of a run."""
    return f"sig:{{{run_id}}}:"


def worker(node: str) -> str:
    """Hash with the facts a worker reports of itself."""
    return f"sig:worker:{node}"


def queue(run_id: str) -> str:
    """The run's Celery queue, on which doorbells ring."""
    return f"run.{run_id}"


def host_queue(node: str) -> str:
    """A worker's own Celery queue, on which it is told to attach and detach."""
    return f"host.{node}"
