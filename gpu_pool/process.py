"""Which process is meant: a pid together with the time when it started.

A pid alone may belong to another process later. Reads /proc and sends signals; Linux only.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process that was there once; `started` is in clock ticks since the machine booted."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has `pid` now; None when there is none."""
        stat = _stat(pid)
        return None if stat is None else cls(pid, stat[1])

    def exists(self) -> bool:
        """True while the pid is its own, also after its end until its parent has read that."""
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.started

    def alive(self) -> bool:
        """True until the process has ended."""
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.started and stat[0] not in "ZX"

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to this process alone, and to no other that took its pid."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.exists():
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)

    def kill_group(self) -> None:
        """Kills the process group that this process leads, if it still does."""
        if self.exists():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def boot_id() -> str:
    """Names the time since the last boot; start times of two boots cannot be compared."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time) from /proc/PID/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and ')'.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
