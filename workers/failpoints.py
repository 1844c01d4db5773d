"""Fail-points: named places where a test stops, breaks or kills a process at an exact stage.

An instrument of `tests/chaos`. Without the environment variable SIGNAL_FAILPOINTS, which is read once at
import, `hit` returns at once and touches nothing; with it, the variable names a folder in which a test
arms a point by putting a file of its name there:

    after:2            (optional) let two passes go by first; counted in a file, over all processes
    when:optim_step    (optional) only passes whose detail has this word
    kill               what to do, the last line

    kill         SIGKILL to this process
    killgroup    SIGKILL to its process group
    wait         stand still until the file NAME.go is there (at most 60 s), so that a test can do
                 anything to any other process at exactly this stage
    raise:ENOSPC raise OSError with that errno
    exit:70      leave at once with that status
    segv         read address 0: a real SIGSEGV
    abort        SIGABRT

A point is claimed by renaming its file to NAME.hit.PID, so it acts once, in one process, whichever comes
first, and the test reads from the name who it was and from the file's ctime when.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

LONGEST_WAIT_S = 60.0
_POLL_S = 0.005

_named = os.environ.get("SIGNAL_FAILPOINTS")
_FOLDER = Path(_named) if _named else None


def hit(name: str, detail: str = "") -> None:
    """A process passes the point `name`; `detail` are words such as the operation's kind."""
    if _FOLDER is None:
        return
    armed = _FOLDER / name
    try:
        *conditions, action = armed.read_text().split()
    except (FileNotFoundError, ValueError):
        return
    if all(_holds(armed, condition, detail) for condition in sorted(conditions, reverse=True)):
        _act(armed, action)


def _holds(armed: Path, condition: str, detail: str) -> bool:
    """Sorted by the caller so that `when` is looked at first: only what matches is counted."""
    what, _, value = condition.partition(":")
    if what == "when":
        return value in detail.split()
    return _passes(armed) > int(value)


def _passes(armed: Path) -> int:
    """This pass's number, by the length of a file that every process appends to."""
    counter = armed.with_name(armed.name + ".passes")
    descriptor = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, b".")
        return os.lseek(descriptor, 0, os.SEEK_CUR)
    finally:
        os.close(descriptor)


def _act(armed: Path, action: str) -> None:
    claim = armed.with_name(f"{armed.name}.hit.{os.getpid()}")
    try:
        armed.rename(claim)
    except FileNotFoundError:
        return  # another process was first
    what, _, value = action.partition(":")
    if what == "wait":
        _wait(claim, armed.with_name(armed.name + ".go"))
    elif what == "raise":
        number = getattr(errno, value)
        raise OSError(number, os.strerror(number))
    else:
        _end(what, value)


def _wait(claim: Path, go: Path) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    # A claim that was cleared away means that nobody waits for this process any more.
    while claim.exists() and not go.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _end(what: str, value: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "killgroup":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    elif what == "exit":
        os._exit(int(value))
    elif what == "segv":
        import ctypes

        ctypes.string_at(0)
    elif what == "abort":
        os.abort()
    else:
        raise ValueError(f"no such action: {what}")
