"""What one worker process holds: its journal connection, one base model, the attached sessions.

Lives in the Celery child only. torch is imported when the first run is attached, never before the
fork: an OpenMP pool or a CUDA context does not survive one.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from typing import Any

from celery import Celery
from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.catalogue import Catalogue
from workers.queue import keys
from workers.queue.journal import Behind, Closed, Fenced, Journal, connect
from workers.session.events import OperationEvents
from workers.session.session import Session
from workers.settings import Settings
from workers.storage import open_storage

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
FACTS_TTL_S = 60


class Host:
    """One per worker process; its methods are the bodies of the Celery tasks."""

    def __init__(self, settings: Settings, app: Celery, node: str) -> None:
        """`node` is the worker's Celery node name."""
        self.settings, self.node = settings, node
        self.redis = connect(settings.redis_url)
        self.journal = Journal(self.redis, open_storage(settings.data_dir), settings)
        self.catalogue = Catalogue(settings)
        self.sessions: dict[str, Session] = {}
        self.events = OperationEvents(app, settings, node)
        self._base: tuple[tuple[Any, ...], Any] | None = None
        self._facts: dict[str, str] = {}
        self._tell(
            pid=os.getpid(),
            parent_pid=os.getppid(),
            host=settings.host_name,
            run="",
            model="",
            state="idle",
        )
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def attach(self, run_id: str, epoch: int, spec: dict[str, Any]) -> None:
        """Load a run's model and adapter, say so, and work off what is queued."""
        held = self.sessions.get(run_id)
        if held is not None and held.epoch >= epoch:
            self.drain(run_id)  # a doubled message must not begin the run anew
            return
        self._tell(run=run_id, model=spec["base_model"], state="loading")
        try:
            session = self._load(run_id, epoch, spec)
        except Exception as error:
            log.exception("run %s cannot be loaded", run_id)
            self._refuse(run_id, epoch, _load_error(spec, error))
            return
        self.sessions[run_id] = session
        # What loading made lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._tell(state="idle")
        try:
            self.journal.report_ready(run_id, epoch, {**spec["device"], "dtype": session.dtype})
        except (Fenced, Closed):
            self.detach(run_id)
            return
        self.drain(run_id)

    def detach(self, run_id: str) -> None:
        """Let go of a run; its base model stays loaded for the next one."""
        self.sessions.pop(run_id, None)
        if self._facts.get("run") == run_id:
            self._tell(run="", state="idle")

    def drain(self, run_id: str, until: int = 0) -> None:
        """Apply a run's eligible operations, up to the entry `until` or all (0).

        A doorbell for a run that is not here does nothing.
        """
        session = self.sessions.get(run_id)
        if session is None:
            return
        self._facts["state"] = "busy"
        try:
            session.drain(until)
        except (Fenced, Closed):
            self.detach(run_id)
        except Behind:
            # The journal lost commits that this process has made. Its memory is ahead of the truth,
            # so it must not go on: the agent sees the death and decides.
            log.critical("run %s is ahead of its journal; this worker ends", run_id, exc_info=True)
            os._exit(70)
        except (RedisError, OSError) as error:
            log.warning(
                "run %s: the journal cannot be reached: %s; the agent rings again", run_id, error
            )
        finally:
            self._facts["state"] = "idle"
            self.events.flush()

    def _load(self, run_id: str, epoch: int, spec: dict[str, Any]) -> Session:
        entry = self.catalogue.entry(spec["base_model"])
        config, device = spec["config"], spec["device"]
        dtype = {None: "auto", True: "bfloat16", False: "float32"}[config["bf16"]]
        wanted = (str(entry.path), dtype, device["kind"])
        if self._base is None or self._base[0] != wanted:
            self._base = None
            gc.unfreeze()
            gc.collect()
            from workers.engine.base import load_base

            where = "cuda" if device["kind"] == "cuda" else "cpu"
            self._base = (
                wanted,
                load_base(entry.path, dtype=dtype, device=where, threads=device.get("threads")),
            )
        return Session(self.journal, run_id, epoch, spec, self._base[1], entry.path, self.events)

    def _refuse(self, run_id: str, epoch: int, error: SignalError) -> None:
        head = self.journal.head(run_id)
        if head is not None and head.epoch == epoch:
            self.journal.close(run_id, "failed", error)
        self._tell(run="", state="idle")

    def _tell(self, **facts: Any) -> None:
        self._facts.update({name: str(value) for name, value in facts.items()})
        self._beat_once()

    def _beat_once(self) -> None:
        pipe = self.redis.pipeline(transaction=False)
        facts: dict[Any, Any] = {**self._facts, "heartbeat": f"{time.time():.3f}"}
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
