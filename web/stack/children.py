"""One process of the stack: how it is started, watched, restarted and stopped.

Starts processes and writes their logs; knows nothing of what they are for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_pool.process import Process

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
# A process that ran this long had started well: its next crash is a new one.
SETTLED_S = 60.0
LOG_LIMIT_BYTES = 20_000_000
UNKNOWN = 255


# Names, in a child's environment, the descriptor of the socket that it inherits.
LISTENER_FD = "SIGNAL_LISTENER_FD"


@dataclass(frozen=True)
class Service:
    """What to run.

    `serves` says whether it is ready; None where running is enough. `listener` gives the descriptor
    of a listening socket to inherit; it is asked at each start, since an adopted process's own socket
    cannot be taken over.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    serves: Callable[[], bool] | None = None
    listener: Callable[[], int] | None = None
    grace_s: float = 5.0


@dataclass
class Child:
    """A service and its process, over all restarts."""

    service: Service
    working: Path
    log: Path
    popen: subprocess.Popen[bytes] | None = None
    process: Process | None = None
    restarts: int = 0
    restart_at: float | None = None
    _delay_s: float = field(default=FIRST_DELAY_S)
    _started_at: float = 0.0
    _log_from: int = 0

    def start(self) -> Process:
        """Starts it in a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone."""
        rotate(self.log)
        environment = dict(self.service.environment)
        inherited: tuple[int, ...] = ()
        if self.service.listener is not None:
            inherited = (self.service.listener(),)
            environment[LISTENER_FD] = str(inherited[0])
        with self.log.open("ab") as log:
            self._log_from = log.tell()
            self.popen = subprocess.Popen(
                self.service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.working,
                env=environment,
                pass_fds=inherited,
                start_new_session=True,
            )
        self.restart_at = None
        self._started_at = time.monotonic()
        # An ended child stays in /proc until it is waited for, so there is always one.
        self.process = Process.of(self.popen.pid)
        assert self.process is not None
        return self.process

    def adopt(self, process: Process, restarts: int) -> None:
        """Takes over a process that another supervisor started and that lives on."""
        self.process, self.restarts = process, restarts
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        self._started_at = time.monotonic()

    def exit_code(self) -> int | None:
        """The exit status when it has ended; negative for a signal. UNKNOWN for an adopted process,
        whose status only its own parent could read."""
        if self.popen is not None:
            return self.popen.poll()
        return None if self.process is None or self.process.alive() else UNKNOWN

    def serves(self) -> bool:
        """Whether it is ready."""
        return self.service.serves is None or self.service.serves()

    def words(self) -> str:
        """The last lines that this start of it wrote."""
        return tail(self.log, since=self._log_from)

    def plan_restart(self) -> float:
        """Sets the time of the next start, later after each quick death; returns the delay."""
        if time.monotonic() - self._started_at > SETTLED_S:
            self._delay_s = FIRST_DELAY_S
        delay, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        self.restart_at = time.monotonic() + delay
        self.restarts += 1
        return delay

    def ask_to_stop(self) -> None:
        """SIGTERM, once."""
        self.restart_at = None
        if self.process and self.exit_code() is None:
            self.process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to it and to whatever it started in its session."""
        if self.popen is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        elif self.process is not None:
            self.process.kill_group()
            if Process.of(self.process.pid) is None:
                # Its pid is nobody's now, so this group holds only what it left behind.
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            wait_for_end([self.process], 5.0)


def wait_for_end(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Waits for all to end; returns those that have not in time."""
    deadline = time.monotonic() + timeout_s
    left = list(processes)
    while left := [process for process in left if process.alive()]:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    return left


def rotate(log: Path) -> None:
    """Keeps a log and its predecessor below the limit. Writers append, so truncating is safe."""
    if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
        with suppress(OSError):  # on a full disk the old lines are given up
            log.with_suffix(".log.1").write_bytes(log.read_bytes())
        os.truncate(log, 0)


def tail(log: Path, lines: int = 20, since: int = 0) -> str:
    """The last lines of a log, of what was written after byte `since`."""
    try:
        with log.open("rb") as file:
            size = log.stat().st_size
            file.seek(max(since if since <= size else 0, size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
