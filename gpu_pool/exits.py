"""How a worker's process ended, in words, and whether what it was executing is to blame. Pure.

Statuses are as `os.waitstatus_to_exitcode` gives them: negative for a signal, None when nobody can tell.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from gpu_pool.process import Process
from workers.exit_codes import DEVICE_BROKEN

# What code does to itself. SIGKILL and SIGTERM come from outside.
_OWN_SIGNALS = frozenset(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
)
# billiard's words on a child: "… pid:12 exited with 'signal 11 (SIGSEGV)'", "… with 'exitcode 71'".
_LOGGED = re.compile(r"pid:(\d+) exited with '(?:(signal) )?(?:exitcode )?(-?\d+)")


@dataclass(frozen=True)
class End:
    """The end of a process of a worker; `out_of_memory` when the kernel killed it for its memory."""

    process: Process
    status: int | None
    out_of_memory: bool = False


def in_words(end: End) -> str:
    """What follows "its process"."""
    if end.out_of_memory:
        return "was killed by the kernel, because memory ran out"
    if end.status is None:
        return "ended"
    if end.status < 0:
        return f"was killed by {_signal_name(-end.status)}"
    return f"exited with status {end.status}"


def blames(end: End) -> bool:
    """Whether the running operation is to blame for this end of the computing process.

    An end that nobody can tell blames nobody: a run must not lose an operation by mistake.
    """
    if end.status is None:
        return False
    return (
        end.out_of_memory
        or end.status == DEVICE_BROKEN
        or (end.status < 0 and -end.status in _OWN_SIGNALS)
    )


def from_outside(end: End) -> bool:
    """Whether somebody else ended the process: neither what it ran nor what it was started for did."""
    killed = end.status in (-signal.SIGKILL, -signal.SIGTERM)
    return killed and not end.out_of_memory


def logged_status(log: str, pid: int) -> int | None:
    """The status that the Celery parent wrote into the worker's log when it read that of `pid`."""
    for found in reversed(list(_LOGGED.finditer(log))):
        if int(found[1]) == pid:
            return -int(found[3]) if found[2] else int(found[3])
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
