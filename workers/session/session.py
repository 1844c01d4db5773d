"""One run in a worker: takes the journal's entries in order, executes them, commits the outcomes.

State, position and the outcome that is not yet committed are one unit: when a commit fails it is
retried, never the operation, since executing an optimizer step twice would change the numbers.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base
from workers.engine.lora import LoraSpec
from workers.engine.trainer import Trainer
from workers.queue.journal import Journal
from workers.queue.records import Outcome, Taken
from workers.session import artifacts
from workers.session.events import OperationEvents
from workers.session.sampling import run_sample
from workers.text.rows import unpack_rows
from workers.text.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

Result = dict[str, Any]
LINGER_S = 0.02
# More than the doorbells that can be under way for finished entries.
DONE_KEPT = 20_000
COMMIT_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Session:
    """A run's adapter, optimizer and place in its journal."""

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        epoch: int,
        spec: dict[str, Any],
        base: Base,
        model_folder: Path,
        events: OperationEvents,
    ) -> None:
        """`spec` is what the agent sent: base_model, the resolved config, the device."""
        config = spec["config"]
        self.journal, self.run_id, self.epoch, self.events = journal, run_id, epoch, events
        self.base_model: str = spec["base_model"]
        self.config: dict[str, Any] = config
        self.seed: int = config["seed"]
        self.tokenizer = load_tokenizer(model_folder)
        self.trainer = Trainer(
            base,
            LoraSpec(
                r=config["lora_r"],
                alpha=config["lora_alpha"],
                target_modules=tuple(config["lora_target_modules"] or ()) or None,
                seed=config["seed"],
            ),
            AdamWSettings(
                learning_rate=config["learning_rate"], weight_decay=config["weight_decay"]
            ),
            gradient_checkpointing=config["gradient_checkpointing"],
        )
        self.dtype: str = base.dtype_name
        # With one message for many operations, a worker that has just finished one listens a moment
        # for the next: a loop that waits for each result then costs no message at all.
        self.linger_s = LINGER_S if journal.settings.doorbell == "coalesced" else 0.0
        self._pending: tuple[Taken, Outcome] | None = None
        self._done: dict[int, None] = {}
        self._primitives: dict[str, Callable[[Taken, dict[str, Any]], Outcome]] = {
            "forward_backward": self._forward_backward,
            "forward": self._forward,
            "optim_step": self._optim_step,
            "sample": self._sample,
            "save_state": self._save_state,
            "complete": self._complete,
        }

    def drain(self, until: int = 0) -> None:
        """Apply eligible entries in order, up to the entry `until`, or all of them (0).

        A message per operation stops at its own entry, so that messages are used up as fast as
        entries are. Raises Fenced, Closed, Behind, or a RedisError on reading.
        """
        self._commit_pending()
        if until in self._done:
            return
        while (taken := self._next()) is not None:
            self.events.started(taken)
            self._pending = (taken, self._execute(taken))
            self._commit_pending()
            if taken.number == until:
                return

    def _next(self) -> Taken | None:
        if not self.linger_s:
            return self.journal.take(self.run_id, self.epoch)
        while True:
            taken = self.journal.take(self.run_id, self.epoch, listening=True)
            if taken is not None:
                return taken
            self.events.flush()
            if not self.journal.listen(self.run_id, self.linger_s):
                return self.journal.take(self.run_id, self.epoch)

    def _commit_pending(self) -> None:
        attempt = 0
        while self._pending is not None:
            taken, outcome = self._pending
            try:
                self.journal.commit(self.run_id, self.epoch, taken, outcome)
            except (RedisError, OSError) as error:
                wait = COMMIT_RETRY_S[min(attempt, len(COMMIT_RETRY_S) - 1)]
                log.warning(
                    "commit of seq %d of %s is tried again in %g s: %s",
                    taken.seq,
                    self.run_id,
                    wait,
                    error,
                )
                time.sleep(wait)
                attempt += 1
                continue
            except SignalError as error:
                # The result itself cannot be stored (a full disk): the operation's effect stands, and
                # its future says why there is no result to read.
                outcome = Outcome(
                    "failed", error=error.to_dict(), data=outcome.data, state=outcome.state
                )
                self._pending = (taken, outcome)
                continue
            self._pending = None
            self._done[taken.number] = None
            if len(self._done) > DONE_KEPT:
                del self._done[next(iter(self._done))]
            self.events.finished(taken, outcome)

    def _execute(self, taken: Taken) -> Outcome:
        try:
            return self._primitives[taken.kind](taken, msgpack.unpackb(taken.body))
        except Exception as error:
            known = _as_signal_error(error)
            if known.code == "operation_failed":
                log.exception("seq %d of %s (%s) failed", taken.seq, self.run_id, taken.kind)
            return Outcome("failed", error=known.to_dict(), state=self._state())

    def _forward_backward(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        result = self.trainer.forward_backward(
            unpack_rows(body["rows"]), body["loss_fn"], body["loss_kwargs"], body["accumulate"]
        )
        result["metrics"]["input_tokens"] = float(taken.tokens)
        numbers = {name: result[name] for name in ("loss", "loss_sum", "num_tokens", "grad_norm")}
        return self._completed(taken, result, {**numbers, **result["metrics"]})

    def _forward(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        result = self.trainer.forward(unpack_rows(body["rows"]), body["top_k"])
        result["metrics"]["input_tokens"] = float(taken.tokens)
        return self._completed(taken, result, result["metrics"])

    def _optim_step(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        if taken.doomed_by is not None:
            self.trainer.clear_accumulation()
            raise SignalError(
                "predecessor_failed",
                f"The forward_backward at seq {taken.doomed_by} failed, so this step was not taken and the "
                "gradients accumulated for it were discarded; on_error=continue opts out.",
            )
        options = {name: value for name, value in body.items() if name != "on_error"}
        result = self.trainer.optim_step(**options)
        numbers = {name: result[name] for name in ("learning_rate", "grad_norm")}
        return self._completed(taken, result, {**numbers, **result["metrics"]})

    def _sample(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        stop = self._stop_check(taken)
        result = run_sample(self.trainer, self.tokenizer, body, self.seed, taken.seq, stop)
        if result is None:
            return Outcome(
                "cancelled", error=SignalError("cancelled").to_dict(), state=self._state()
            )
        return self._completed(taken, result, result["metrics"])

    def _stop_check(self, taken: Taken) -> Callable[[], bool]:
        """Looks at the journal at most twenty times a second; a Redis that is away stops nothing."""
        last = [time.monotonic(), False]

        def must_stop() -> bool:
            now = time.monotonic()
            if now - last[0] >= 0.05 and not last[1]:
                last[0] = now
                try:
                    last[1] = self.journal.must_stop(self.run_id, self.epoch, taken.number)
                except (RedisError, OSError) as error:
                    log.warning("cannot look whether seq %d is cancelled: %s", taken.seq, error)
            return bool(last[1])

        return must_stop

    def _save_state(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        manifest = self._save(taken, body["name"] or f"step-{self.trainer.step:06d}", body["mode"])
        result = {
            "step": self.trainer.step,
            "name": manifest["name"],
            "mode": manifest["mode"],
            "artifact_uri": f"/runs/{self.run_id}/artifacts/{manifest['name']}",
            "size_bytes": manifest["total_size_bytes"],
            "manifest": manifest,
        }
        return self._completed(taken, result, {}, artifact=manifest)

    def _complete(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        manifest = self._save(taken, body["name"] or "final", "adapter") if body["save"] else None
        result = {"step": self.trainer.step, "artifact": manifest["name"] if manifest else None}
        return self._completed(taken, result, {}, artifact=manifest, close_status="completed")

    def _save(self, taken: Taken, name: str, mode: str) -> dict[str, Any]:
        facts = {
            "run_id": self.run_id,
            "seq": taken.seq,
            "base_model": self.base_model,
            "config": self.config,
        }
        return artifacts.save_adapter(self.journal.storage, self.trainer, name, mode, facts)

    def _completed(
        self,
        taken: Taken,
        result: Result,
        metrics: dict[str, float],
        artifact: dict[str, Any] | None = None,
        close_status: str = "",
    ) -> Outcome:
        now = time.time()
        result["seq"] = taken.seq
        result["timings"] = {
            "queued_ms": round(max(0.0, taken.started_at - taken.submitted_at) * 1e3, 3),
            "execute_ms": round(max(0.0, now - taken.started_at) * 1e3, 3),
        }
        data: dict[str, Any] = {"step": self.trainer.step, "metrics": metrics}
        if artifact is not None:
            data["artifact"] = artifact
        body = json.dumps(result, allow_nan=False, separators=(",", ":")).encode()
        return Outcome("completed", body, data=data, state=self._state(), close_status=close_status)

    def _state(self) -> dict[str, Any]:
        return {"step": self.trainer.step, "accumulated": self.trainer.accumulated}


def _as_signal_error(error: Exception) -> SignalError:
    if isinstance(error, SignalError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "OutOfMemory" in text or "can't allocate memory" in text:
        return SignalError("out_of_memory")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SignalError("storage_full")
    return SignalError(
        "operation_failed",
        f"The worker failed on this operation; the run is unchanged. {text}"[:2000],
    )
