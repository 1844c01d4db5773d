"""What one worker process holds: its journal connection, one base model, the sessions of its runs.

Runs of equal base share it: a second one costs its own state alone, and is ready as soon as that is in
memory. Lives in the Celery child only. torch is imported when the first run is attached, never before the
fork: an OpenMP pool or a CUDA context does not survive one.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.catalogue import Catalogue
from workers.executing import Executing, path_of
from workers.queue import keys
from workers.queue.app import wake
from workers.queue.journal import Closed, Fenced, Journal, Missing, connect
from workers.session.events import OperationEvents
from workers.session.rota import Rota
from workers.session.sampling import Sampler
from workers.settings import Settings
from workers.storage import open_storage

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
FACTS_TTL_S = 60


class Host:
    """One per worker process; its methods are the bodies of the Celery tasks."""

    def __init__(self, settings: Settings, app: Celery, node: str) -> None:
        """`node` is the worker's Celery node name."""
        self.settings, self.node, self.app = settings, node, app
        self.redis = connect(settings.redis_url)
        self.journal = Journal(self.redis, open_storage(settings), settings)
        self.catalogue = Catalogue(settings)
        self.events = OperationEvents(app, settings, node)
        self.sampler = Sampler()
        self.rota = Rota(
            self.journal,
            Executing(path_of(settings.data_dir / "logs", node)),
            self.sampler,
            between=self._between,
            stopping=self.stopping,
            drop=self._drop,
        )
        self.sessions = self.rota.sessions
        self._base: tuple[tuple[Any, ...], Any] | None = None
        self._facts: dict[str, str] = {}
        # The run that is on its way into memory.
        self._arriving = ""
        self._progress, self._busy, self._stopping = 0, False, False
        signal.signal(signal.SIGUSR1, self._stop)
        self._tell(
            pid=os.getpid(),
            parent_pid=os.getppid(),
            host=settings.host_name,
            model="",
            state="idle",
        )
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def warm(self) -> None:
        """Load what a first run would have to wait for, and make a dry pass of every primitive."""
        if self._facts["state"] != "idle" or self.sessions:
            return
        from workers.session.warming import warm_up

        self._tell(state="warming")
        warm_up()
        gc.collect()
        self._tell(state="warm")

    def attach(self, run_id: str, epoch: int, spec: dict[str, Any]) -> None:
        """Bring a run's session into memory, say so, and work off what is queued."""
        held = self.sessions.get(run_id)
        if held is not None and held.epoch >= epoch:
            self.drain(run_id)  # a doubled message must not begin the run anew
            return
        if self._stopping:
            return
        self.rota.leave(run_id)
        self._arriving = run_id
        self._tell(model=spec["base_model"], state="loading")
        # Others may be served while it arrives, and what they do must not be left in the middle.
        with self._at_work() if self.sessions else nullcontext():
            arrived = self._try(run_id, epoch, spec)
        self._arriving = ""
        self._facts["state"] = "idle"
        if not arrived:
            self._tidy()
            return
        self._tell()
        self.drain(run_id)

    def _try(self, run_id: str, epoch: int, spec: dict[str, Any]) -> bool:
        """Whether the session is in memory."""
        from workers.session.primitives import Abandoned

        try:
            with self.rota.executing.of(run_id):
                self._arrive(run_id, epoch, spec)
        except Abandoned:
            return False
        except (Fenced, Closed, Missing) as error:
            log.warning("%s is not attached: %r", run_id, error)
            return False
        except (RedisError, OSError) as error:
            # Not the run's fault: the agent sends it again.
            log.warning("%s cannot be attached now: %s", run_id, error)
            return False
        except Exception as error:
            log.exception("run %s cannot be loaded", run_id)
            self._refuse(run_id, epoch, _load_error(spec, error))
            return False
        return True

    def _arrive(self, run_id: str, epoch: int, spec: dict[str, Any]) -> None:
        from workers.session.arrival import arrive

        begun = time.monotonic()
        session = self._load(run_id, epoch, spec)
        arrive(session, spec, time.monotonic() - begun)
        self.rota.join(session)

    def detach(self, run_id: str) -> None:
        """Let go of a run; of a living one with a last snapshot. Its base model stays loaded."""
        session = self.rota.leave(run_id)
        if session is not None:
            with self._at_work():
                session.close()
        del session
        self._tidy()

    def _tidy(self) -> None:
        """Some run was let go of: what it held is free, and the report names it no more."""
        gc.collect()
        self._tell()

    def drain(self, run_id: str, until: int = 0) -> None:
        """Apply a run's eligible operations, up to the entry `until` or all (0), and others' as it is their
        turn.

        A doorbell for a run that is not here does nothing.
        """
        if run_id not in self.sessions or self.stopping():
            return
        self._facts["state"] = "busy"
        with self._at_work():
            try:
                if self.rota.serve(run_id, until):
                    # Samples of another run may be all that is left to do.
                    for one in {run_id, self.sampler.oldest or run_id}:
                        wake(self.app, one)
            except (RedisError, BrokerError, OSError) as error:
                log.warning(
                    "run %s: the journal cannot be reached: %s; the agent rings again",
                    run_id,
                    error,
                )
            finally:
                self._facts["state"] = "idle"
                self.events.flush()

    def stopping(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._stopping

    def _drop(self, run_id: str) -> None:
        """The run is another's by now, or over: nothing of it may be written any more."""
        session = self.rota.leave(run_id)
        if session is not None:
            # What is being written must not come after a deletion of the run.
            session.snapshots.wait()
        del session
        self._tidy()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        """SIGUSR1, in the main thread: leave after the present operation."""
        self._stopping = True
        if not self._busy:
            self._leave_all()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What may not be left in the middle."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            if self._stopping:
                self._leave_all()

    def _leave_all(self) -> None:
        """The end of this process, and by it of the worker: the agent sees to that. Celery's own way would
        at times wait half a minute for a result that nobody reads."""
        for session in self.sessions.values():
            try:
                session.close()
            except Exception:
                log.exception("%s is left as it is", session.run_id)
        os._exit(0)

    def _between(self) -> None:
        """Between two operations, and wherever a long one stands still. Who works in the background of all
        runs gets its share of the worker here."""
        self._note_progress()

    def _note_progress(self) -> None:
        self._progress += 1

    def _load(self, run_id: str, epoch: int, spec: dict[str, Any]) -> Any:
        from workers.session.session import Session, Worker

        entry = self.catalogue.entry(spec["base_model"])
        from workers.session.training import base_options

        device = spec["device"]
        where = "cuda" if device["kind"] == "cuda" else "cpu"
        options = base_options(spec["config"], where)
        # A base whose own weights are trained is nobody else's.
        only = run_id if not spec["config"]["lora_r"] else ""
        wanted = (str(entry.path), only, epoch if only else 0, *options.values())
        if self._base is None or self._base[0] != wanted:
            self._base = None
            gc.unfreeze()
            gc.collect()
            from workers.engine.base import load_base

            threads = device.get("threads")
            base = load_base(entry.path, threads=threads, **options)
            base.pause = self.rota.pause
            self._base = (wanted, base)
            # What loading made lives as long as the process: the collector need not look at it again.
            gc.collect()
            gc.freeze()
        worker = Worker(
            self.node,
            self.events,
            self._note_progress,
            self.stopping,
            self.rota.pause,
            self.sampler,
        )
        return Session(self.journal, run_id, epoch, spec, self._base[1], entry.path, worker)

    def _refuse(self, run_id: str, epoch: int, error: SignalError) -> None:
        head = self.journal.head(run_id)
        if head is not None and head.epoch == epoch:
            self.journal.close(run_id, "failed", error)

    def _tell(self, **facts: Any) -> None:
        runs = [*self.sessions, *([self._arriving] if self._arriving else [])]
        facts["runs"] = ",".join(runs)
        self._facts.update({name: str(value) for name, value in facts.items()})
        self._beat_once()

    def _beat_once(self) -> None:
        pipe = self.redis.pipeline(transaction=False)
        own = {"heartbeat": f"{time.time():.3f}", "progress": str(self._progress)}
        facts: dict[Any, Any] = {**self._facts, **own}
        pipe.hset(keys.worker(self.node), mapping=facts)
        pipe.expire(keys.worker(self.node), FACTS_TTL_S)
        pipe.execute()

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            try:
                self._beat_once()
            except (RedisError, OSError) as error:
                log.warning("no heartbeat: %s", error)


def _load_error(spec: dict[str, Any], error: Exception) -> SignalError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, SignalError):
        if error.code != "model_load_failed":
            return error
        reason = error.message
    return SignalError(
        "model_load_failed", f"The worker could not load {spec['base_model']!r}: {reason}"[:2000]
    )
