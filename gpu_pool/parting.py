"""How a lease ends: what is recorded of it, what the run's journal is told. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_pool.leases import MOVED, START_FAILED
from schemas.errors import SignalError


@dataclass(frozen=True)
class Parting:
    """Why a run and its worker part. The run itself goes on, unless its journal is closed.

    `lost`: how the worker was lost, in words; empty where it let go of the run in order. `blame`: by
    what the running operation did. `error`: what the run fails with when it was tried often enough.
    """

    reason: str
    lost: str = ""
    blame: bool = False
    error: SignalError | None = None


ENDED = Parting("ended")
PAUSED = Parting("paused")
LEFT = Parting(MOVED)
DRAINED = Parting("drained")
# Another lease is installed in the journal, or the journal is gone and its worker cannot mend it.
SUPERSEDED = Parting("superseded")
JOURNAL_LOST = Parting("journal_lost")
# The agent that served it died, and its worker with it.
RESTARTED = Parting("worker_lost", "the agent of its host was started anew without it")


def lost_host(host: str) -> Parting:
    """Nothing was heard of the host for too long."""
    return Parting("host_lost", f"nothing is heard of host {host}")


def lost_worker(why: str, *, blame: bool) -> Parting:
    """A worker that had its run ready is gone, or one that was killed from outside."""
    return Parting("worker_lost", why, blame)


def failed_start(why: str, last_words: str, *, blame: bool = False) -> Parting:
    """A worker is gone before it had its run ready."""
    said = f" The end of its log:\n{last_words}" if last_words else ""
    error = SignalError("worker_start_failed", f"The run's worker did not start: {why}.{said}")
    return Parting(START_FAILED, why, blame, error)
