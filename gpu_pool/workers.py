"""Worker processes: start one pinned to a slot, see that it has ended and why, stop it.

A worker is a Celery parent and its one child in a process group of their own, in an empty working
folder, so that no file of the user's can be imported in place of ours. It is not bound to the
agent's life. Touches processes and log files; no Redis, no SQL.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gpu_pool.devices import Slot
from gpu_pool.process import Process
from workers.queue import keys
from workers.settings import Settings

_KEPT_LOGS = 50
_TAIL_BYTES, _TAIL_LINES = 2000, 12


class Worker:
    """One worker process group; `child` is known once the child has reported itself."""

    def __init__(
        self, node: str, parent: Process, log: Path, popen: subprocess.Popen[bytes] | None = None
    ) -> None:
        """`popen` is None for a worker that another agent started."""
        self.node, self.parent, self.log = node, parent, log
        self.child: Process | None = None
        self.started_at = time.monotonic()
        self._popen = popen
        self._first: Process | None = None
        self._why: str | None = None
        self._log_mark = 0

    def know_child(self, pid: int) -> bool:
        """Takes note of the child; False when the pid is not of this worker's group (any more)."""
        try:
            group = os.getpgid(pid)
        except ProcessLookupError:
            return False
        self.child = Process.of(pid) if group == self.parent.pid else None
        return self.child is not None

    def note_end(self, process: Process) -> None:
        """The watcher's word that this process of the worker has ended; the first one counts."""
        self._first = self._first or process

    def ended(self) -> str | None:
        """How the worker ended, for people to read; None while both of its processes live."""
        self._why = self._why or self._look()
        return self._why

    def stop(self) -> None:
        """Asks for a warm shutdown: the running task ends first. The parent alone gets the signal,
        because the child would die of it at once."""
        self.parent.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends both processes now. Safe to repeat, and from any thread."""
        self.parent.kill_group()
        if self.child is not None:
            self.child.signal(signal.SIGKILL)

    def gone(self) -> bool:
        """True when no process of the worker is left."""
        child_lives = self.child is not None and self.child.alive()
        return not child_lives and not self.parent.alive()

    def reap(self) -> None:
        """Reads the exit status of the parent, so that no zombie stays; kills what still runs."""
        self.kill()
        if self._popen is not None:
            self._popen.wait()

    def mark_log(self) -> None:
        """From here on the log is about the next run; what it said before is not its owner's."""
        with suppress(FileNotFoundError):
            self._log_mark = self.log.stat().st_size

    def last_words(self) -> str:
        """The end of the log, since the mark."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(self._log_mark, self.log.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.strip().splitlines()[-_TAIL_LINES:])

    def _look(self) -> str | None:
        child_ended = self.child is not None and not self.child.alive()
        if child_ended and self._first != self.parent:
            return "its computing process was killed or crashed"
        if not self.parent.alive():
            # Its group can be named only as long as nobody has read its exit status.
            self.kill()
            return f"its process {self._exit()}"
        return None

    def _exit(self) -> str:
        code = self._popen.poll() if self._popen is not None else None
        if code is None:
            return "ended"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"


def start_worker(settings: Settings, slot: Slot) -> Worker:
    """Starts a worker pinned to `slot`; it reports itself when it gets the `hello` task."""
    node = f"{slot.name}-{secrets.token_hex(2)}@{settings.host_name}"
    folder, log = settings.data_dir / "run" / "empty", settings.data_dir / "logs" / f"{node}.log"
    for path in (folder, log.parent):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _prune(log.parent)
    with log.open("ab") as output:
        popen = subprocess.Popen(
            command(node),
            cwd=folder,
            env=environment(os.environ, slot, node),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    parent = Process.of(popen.pid)
    assert parent is not None  # it cannot vanish before this process reads its exit status
    return Worker(node, parent, log, popen)


def command(node: str) -> list[str]:
    """The command line of a worker."""
    celery = [sys.executable, "-P", "-m", "celery", "-q", "-A", "workers.main:app", "worker"]
    options = ["-P", "prefork", "-c", "1", "--without-gossip", "--without-mingle", "-E"]
    return [*celery, *options, "-l", "WARNING", "-n", node, "-Q", keys.host_queue(node)]


def environment(inherited: Mapping[str, str], slot: Slot, node: str) -> dict[str, str]:
    """The agent's own environment, which holds the settings, and what names and pins the worker."""
    return {**inherited, "PYTHONUNBUFFERED": "1", "SIGNAL_NODE": node, **slot.environment()}


def _prune(folder: Path) -> None:
    """Every worker has a log of its own; the oldest go."""
    logs = sorted(folder.glob("*-????@*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-_KEPT_LOGS]:
        path.unlink(missing_ok=True)
