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
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gpu_pool.devices import Slot
from gpu_pool.exits import End, blames, in_words, logged_status
from gpu_pool.process import Process, having
from workers.executing import last_executed, path_of
from workers.queue import keys
from workers.settings import Settings

_KEPT_LOGS = 50
_TAIL_BYTES, _TAIL_LINES = 2000, 12
# So long the watcher may take to tell of an end.
UNTOLD_S = 1.0
# By this variable a worker's processes are found that no record names.
_MARK = "SIGNAL_WORKER_OF"


class Worker:
    """One worker process group; `child` is known once the child has reported itself."""

    def __init__(
        self, node: str, parent: Process, log: Path, popen: subprocess.Popen[bytes] | None = None
    ) -> None:
        """`popen` is None for a worker that another agent started."""
        self.node, self.parent, self.log = node, parent, log
        self.child: Process | None = None
        # From here on the log is about the run that the worker has.
        self.log_mark = 0
        self._popen = popen
        self._first: End | None = None
        self._dead_since: float | None = None

    def know_child(self, pid: int) -> bool:
        """Takes note of the child; False when the pid is not of this worker's group (any more)."""
        try:
            group = os.getpgid(pid)
        except ProcessLookupError:
            return False
        self.child = Process.of(pid) if group == self.parent.pid else None
        if self.child is not None:
            _prefer_to_kill(pid)
        return self.child is not None

    def processes(self) -> list[Process]:
        """Those that are known: the parent, and the child."""
        return [self.parent] if self.child is None else [self.parent, self.child]

    def note_end(self, end: End) -> None:
        """The watcher's word that a process of the worker has ended; the first one counts."""
        self._first = self._first or end

    def ended(self) -> End | None:
        """The first of its processes to end, and how; None while they live."""
        self._first = self._first or self._find_end()
        if self._first is not None and self._first.status is None:
            self._first = replace(self._first, status=self._status_of(self._first.process))
        return self._first

    def why(self, end: End) -> str:
        """What `ended` said, for people to read."""
        which = "process" if end.process == self.parent else "computing process"
        return f"its {which} {in_words(end)}"

    def blames(self, end: End) -> bool:
        """Whether what the worker was executing brought it down."""
        return end.process == self.child and blames(end)

    def drain(self) -> None:
        """Has the child stop after the present operation, write a snapshot, and end; whoever watches it
        then ends the rest. A worker whose child is not known has nothing to finish."""
        if self.child is not None:
            self.child.signal(signal.SIGUSR1)
        else:
            self.kill()

    def kill(self) -> None:
        """Ends both processes now. Safe to repeat, and from any thread."""
        self.parent.kill_group()
        if self.child is not None:
            self.child.signal(signal.SIGKILL)

    def gone(self) -> bool:
        """True when no process of the worker is left."""
        return not any(process.alive() for process in self.processes())

    def reap(self) -> None:
        """Reads the exit status of the parent, so that no zombie stays; kills what still runs."""
        self.kill()
        if self._popen is not None:
            self._popen.wait()

    def lived_s(self) -> float:
        """Seconds since the parent was started."""
        ticks = os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.parent.started / ticks

    def mark_log(self) -> None:
        """What the log said until now is not about the next run, and not for its owner."""
        with suppress(FileNotFoundError):
            self.log_mark = self.log.stat().st_size

    def executing(self) -> str:
        """The run whose operation it executes, or executed at its end; "" for none."""
        return last_executed(path_of(self.log.parent, self.node))

    def last_words(self) -> str:
        """The end of the log, since the mark."""
        return "\n".join(self._log_end().strip().splitlines()[-_TAIL_LINES:])

    def _log_end(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(self.log_mark, self.log.stat().st_size - _TAIL_BYTES))
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _find_end(self) -> End | None:
        """An end that the watcher does not tell of. It is given time to: it sees the status, and a
        process whose first thread is gone may still be ending."""
        dead = next((one for one in reversed(self.processes()) if not one.alive()), None)
        if dead is None:
            return None
        self._dead_since = self._dead_since or time.monotonic()
        if time.monotonic() - self._dead_since < UNTOLD_S:
            return None
        # The parent's group can be named only as long as somebody of it is left.
        self.kill()
        return End(dead, None)

    def _status_of(self, process: Process) -> int | None:
        """What is left to ask when the watcher could not tell how a process ended."""
        if process == self.parent:
            return self._popen.poll() if self._popen is not None else None
        return logged_status(self._log_end(), process.pid)


def _prefer_to_kill(pid: int) -> None:
    """When memory runs out the kernel takes who computes, and not the server that would rebuild it."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")


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
            env=environment(os.environ, settings, slot, node),
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


def environment(
    inherited: Mapping[str, str], settings: Settings, slot: Slot, node: str
) -> dict[str, str]:
    """The agent's own environment, which holds the settings, and what names and pins the worker."""
    own = {
        "PYTHONUNBUFFERED": "1",
        # A worker that crashes says where, in its log.
        "PYTHONFAULTHANDLER": "1",
        "SIGNAL_NODE": node,
        _MARK: str(settings.data_dir),
    }
    return {**inherited, **own, **slot.environment()}


def strays(settings: Settings, known: Iterable[Worker]) -> list[Process]:
    """Processes of workers of this data folder that belong to none of those that are known."""
    groups = {worker.parent.pid for worker in known}
    return [
        process
        for process in having(_MARK, str(settings.data_dir))
        if process.group() not in groups
    ]


def _prune(folder: Path) -> None:
    """Every worker has a log of its own; the oldest go."""
    logs = sorted(folder.glob("*-????@*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-_KEPT_LOGS]:
        path.unlink(missing_ok=True)
        path_of(folder, path.stem).unlink(missing_ok=True)
