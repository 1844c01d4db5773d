"""Finds and ends what a stack left behind when its supervisor, or the pool's agent, was killed.

Looks for the mark in /proc/PID/environ of this user's processes, so it needs no record and cannot hit
a process that merely has an old pid.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

from gpu_pool.process import Process
from web.stack.children import wait_for_end
from web.stack.environment import MARK
from web.stack.folder import Folder


def marked(folder: Folder) -> list[Process]:
    """Every living process of this data folder's stack, but this one."""
    wanted = os.fsencode(f"{MARK}={folder.root}")
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        process = Process.of(int(entry.name))
        if process and process.alive() and _has(entry / "environ", wanted):
            found.append(process)
    return found


def end(processes: Iterable[Process], *, grace_s: float) -> list[Process]:
    """Asks each to end, waits, then kills; returns those that had to be killed."""
    asked = [process for process in processes if process.alive()]
    for process in asked:
        process.signal(signal.SIGTERM)
    stubborn = wait_for_end(asked, grace_s)
    for process in stubborn:
        process.signal(signal.SIGKILL)
    wait_for_end(stubborn, 5)
    return stubborn


def sweep(folder: Folder, *, grace_s: float = 3) -> list[Process]:
    """Ends all that is marked, also what was started meanwhile; returns what was found."""
    found = []
    for _ in range(5):
        now = marked(folder)
        if not now:
            break
        found += now
        end(now, grace_s=grace_s)
    return found


def _has(environ: Path, wanted: bytes) -> bool:
    try:
        return wanted in environ.read_bytes().split(b"\0")
    except OSError:  # another user's, or gone
        return False
