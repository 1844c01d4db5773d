"""When a session is snapshotted, and the thread that writes it while training goes on.

The copy is taken between two operations; everything after that happens in the background: write, read
back, tell the journal, seal what lies behind the second-newest snapshot, drop what is too old. The next
snapshot is due when the cost of the last one is at most a set share of the time since.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.engine.state import TrainerState
from workers.failpoints import hit
from workers.queue.journal import Closed, Fenced, Journal, Missing
from workers.queue.records import Snapshot
from workers.session.snapshots import SnapshotInfo, Snapshots, to_keep

log = logging.getLogger(__name__)

# Between two attempts where the disk is full or storage is away.
RETRY_S = 30.0
FIRST_COST_S = 0.02


@dataclass(frozen=True)
class Copied:
    """A session's state at a seq, on its way to storage."""

    state: TrainerState
    facts: dict[str, Any]
    seconds: float
    executed_s: float

    @property
    def seq(self) -> int:
        """The seq that the state is at."""
        return int(self.facts["seq"])


class Snapshotter:
    """The snapshots of one session. All methods are for the session's own thread."""

    def __init__(
        self,
        journal: Journal,
        snapshots: Snapshots,
        run_id: str,
        epoch: int,
        sealed: Callable[[int], None],
        *,
        rooted: bool = True,
    ) -> None:
        """`sealed(seq)` is called, from the writing thread, when the journal is sealed up to a seq.

        `rooted` is false for a run that began from another's state: it cannot be replayed from nothing.
        """
        self._rooted = rooted
        self._journal, self._snapshots = journal, snapshots
        self._run_id, self._epoch, self._sealed = run_id, epoch, sealed
        self._settings = journal.settings
        self._thread: threading.Thread | None = None
        self._cost_s = FIRST_COST_S
        self._ended_at = time.monotonic()
        self._retry_at = 0.0
        self._operations = self._bytes = 0
        # Of the newest verified snapshot: its seq, and how long the session had executed until then.
        self.seq = -1
        self.executed_s = 0.0
        self._told: tuple[Snapshot, int] | None = None

    def found(self, seq: int) -> None:
        """The session was restored from a snapshot at `seq`."""
        self.seq = seq

    def count(self, size: int) -> None:
        """Another operation was committed, with `size` bytes of body and result."""
        self._operations += 1
        self._bytes += size

    def due(self, *, light: bool = True) -> bool:
        """Whether the state should be copied now; one that will soon be smaller (not `light`) only when the
        bounds on operations or bytes are reached."""
        now, settings = time.monotonic(), self._settings
        if not self._operations or self._busy() or now < self._retry_at:
            return False
        if self._operations >= settings.snapshot_max_operations:
            return True
        if self._bytes >= settings.snapshot_max_bytes:
            return True
        return light and now - self._ended_at >= self._cost_s / settings.snapshot_share

    def begin(self, copied: Copied) -> None:
        """Write `copied` in the background."""
        self._operations = self._bytes = 0
        self._thread = threading.Thread(
            target=self._write, args=(copied,), name="snapshot", daemon=True
        )
        self._thread.start()

    def write_now(self, copied: Copied) -> bool:
        """Write `copied` before going on; False when that failed (it is in the log)."""
        self.wait()
        if self.seq == copied.seq:
            return True
        self._write(copied)
        return self.seq == copied.seq

    def tell_again(self) -> None:
        """Tell the journal of the newest snapshot, also after a loss. Raises Fenced, Missing."""
        if self._told is not None:
            self._journal.note_snapshot(self._run_id, self._epoch, *self._told)

    def wait(self, seconds: float = 60.0) -> None:
        """Until nothing is being written any more; for a bounded time."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, copied: Copied) -> None:
        # The thread's own CPU time is what it took from the session: both share a core and a lock.
        begun = time.thread_time()
        try:
            hit("snapshot.captured")
            info = self._snapshots.write(copied.state, copied.facts)
            hit("snapshot.verified")
            self._cost_s = copied.seconds + time.thread_time() - begun
            self._tell(copied, info)
            self._tidy()
        except (Fenced, Closed, Missing) as error:
            log.info("the snapshot of %s at %d: %r", self._run_id, copied.seq, error)
        except (SignalError, RedisError, OSError) as error:
            self._retry_at = time.monotonic() + RETRY_S
            log.warning("no snapshot of %s at seq %d: %s", self._run_id, copied.seq, error)
        except Exception:
            self._retry_at = time.monotonic() + RETRY_S
            log.exception("no snapshot of %s at seq %d", self._run_id, copied.seq)
        finally:
            self._cost_s = max(self._cost_s, copied.seconds + time.thread_time() - begun)
            self._ended_at = time.monotonic()

    def _tell(self, copied: Copied, info: SnapshotInfo) -> None:
        note = Snapshot(copied.seq, info.key, time.time(), info.size_bytes, round(self._cost_s, 6))
        oldest = self._branch_from(info)
        self._told = (note, oldest)
        self.tell_again()
        self.seq, self.executed_s = copied.seq, copied.executed_s

    def _tidy(self) -> None:
        """Seal behind the second-newest snapshot and drop what the policy does not keep."""
        settings, infos = self._settings, self._snapshots.infos()
        self._journal.prune_free(self._run_id)
        if len(infos) > 1:
            hit("journal.sealing")
            base = self._journal.seal(self._run_id, self._epoch, infos[1].seq)
            hit("journal.trimmed")
            self._sealed(base)
        kept = to_keep(
            infos,
            every=settings.history_every,
            now=time.time(),
            history_s=settings.history_s,
            history_bytes=settings.history_bytes,
        )
        if len(kept) < len(infos):
            self._snapshots.prune({info.key for info in kept})
        # A result may be asked for as long as it lives, whatever history is kept.
        self._journal.segments.prune(
            self._run_id,
            min(info.seq for info in kept),
            time.time() - max(settings.result_ttl_s, 0),
        )

    def _branch_from(self, newest: SnapshotInfo) -> int:
        """The oldest seq to which the run can be brought again."""
        segments = self._journal.segments.all(self._run_id)
        if self._rooted and (not segments or segments[0].first == 1):
            return 0
        return min(info.seq for info in (newest, *self._snapshots.infos()))
