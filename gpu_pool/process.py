"""Which process is meant: a pid together with the time when it started.

A pid alone may belong to another process later. Reads /proc and sends signals; Linux only.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# linux/pidfd.h: PIDFD_GET_INFO with the first version of struct pidfd_info, which begins with the
# mask of what is asked for and what is given, and ends with the exit status.
_INFO_BYTES, _INFO_EXIT = 64, 1 << 3
_GET_INFO = (3 << 30) | (_INFO_BYTES << 16) | (0xFF << 8) | 11


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

    def exit_status(self, descriptor: int) -> int | None:
        """How it ended, negative for a signal; None where nobody can tell. `descriptor`: its pidfd.

        Works for processes of other parents too: /proc shows the status until the parent has read
        it, and from then on the pidfd itself does, since Linux 6.15.
        """
        stat = _stat(self.pid)
        if stat is not None and stat[1] == self.started:
            raw = stat[2] if stat[0] in "ZX" else None
        else:
            raw = _status_by_pidfd(descriptor)
        return None if raw is None else os.waitstatus_to_exitcode(raw)

    def group(self) -> int | None:
        """The pid of its group's leader; None when it is gone."""
        try:
            return os.getpgid(self.pid) if self.exists() else None
        except ProcessLookupError:
            return None

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
        """Kills the process group that this process leads, or led: once the pid is nobody's, the
        group's name is still its own as long as a member of it lives."""
        if self.exists() or _stat(self.pid) is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def having(variable: str, value: str) -> list[Process]:
    """This user's living processes that were started with `variable` set to `value`."""
    wanted = os.fsencode(f"{variable}={value}")
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            has = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # another user's, or gone
            continue
        process = Process.of(int(entry.name)) if has else None
        if process is not None and process.alive():
            found.append(process)
    return found


def boot_id() -> str:
    """Names the time since the last boot; start times of two boots cannot be compared."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state letter, start time, wait status) from /proc/PID/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses and may itself hold spaces and ')'.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19]), int(fields[49])


def _status_by_pidfd(descriptor: int) -> int | None:
    answer = bytearray(_INFO_BYTES)
    struct.pack_into("Q", answer, 0, _INFO_EXIT)
    try:
        fcntl.ioctl(descriptor, _GET_INFO, answer)
    except OSError:  # an older kernel
        return None
    given, status = struct.unpack("Q52xi", answer)
    return int(status) if given & _INFO_EXIT else None
