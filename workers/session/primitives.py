"""What each kind of operation does to a session's trainer, and the answer that it gives.

An operation that raises has changed nothing, but for one effect that is named in its record: a refused
optim_step discards the accumulated gradients, and a replay must discard them too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import msgpack

from schemas.errors import SignalError
from workers.engine.certificate import certificate
from workers.engine.trainer import Trainer
from workers.failpoints import hit
from workers.queue.records import Outcome, Taken
from workers.session import artifacts
from workers.session.errors import as_signal_error, leave_broken_device
from workers.storage import Storage
from workers.text.rows import unpack_rows
from workers.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Result = dict[str, Any]


class Abandoned(Exception):
    """The worker is to stop: the running operation has changed nothing and is left to the next worker."""


class Primitives:
    """The operations of one run."""

    def __init__(
        self,
        run_id: str,
        base_model: str,
        config: dict[str, Any],
        trainer: Trainer,
        tokenizer: Tokenizer,
        storage: Storage,
        fingerprint: tuple[str, dict[str, Any]],
    ) -> None:
        """`fingerprint` is its id and itself."""
        self.run_id, self.base_model, self.config = run_id, base_model, config
        self.trainer, self.tokenizer, self.storage = trainer, tokenizer, storage
        self._fingerprint_id, self._fingerprint = fingerprint
        # The last seq that changed the state, which a certificate is about.
        self.state_seq = 0
        # Spent on operations that a rebuild would execute again.
        self.executed_s = 0.0
        # Of the operation that is executed again, if it is one.
        self._plan: Any = None
        self.extra_state: Callable[[], dict[str, Any]] = dict
        self._kinds: dict[str, Callable[[Taken, dict[str, Any]], Outcome]] = {
            "forward_backward": self._forward_backward,
            "forward": self._forward,
            "optim_step": self._optim_step,
            "load_state": self._load_state,
            "save_state": self._save_state,
            "certificate": self._certificate,
            "complete": self._complete,
        }

    def execute(self, taken: Taken, plan: Any = None) -> Outcome:
        """The outcome of an operation that is no sample, failed ones included.

        `plan` is what the record of an earlier execution says of how it was computed.
        """
        accumulated, begun = self.trainer.accumulated, time.monotonic()
        try:
            self._plan = plan
            outcome = self._kinds[taken.kind](taken, msgpack.unpackb(taken.body))
        except Exception as error:
            cleared = self.trainer.accumulated < accumulated
            if cleared:
                self.state_seq = taken.seq
            return self.failed(taken, error, {"effect": "cleared"} if cleared else {})
        if taken.kind in ("forward_backward", "optim_step", "load_state"):
            self.state_seq = taken.seq
            self.executed_s += time.monotonic() - begun
        return outcome

    def failed(
        self, taken: Taken, error: Exception, record: dict[str, Any] | None = None
    ) -> Outcome:
        """The outcome of an operation that raised; does not return where the device is broken."""
        leave_broken_device(error)
        known = as_signal_error(error)
        if known.code == "operation_failed":
            log.error(
                "seq %d of %s (%s) failed", taken.seq, self.run_id, taken.kind, exc_info=error
            )
        return Outcome("failed", error=known.to_dict(), state=self.state(), record=record or {})

    def state(self) -> dict[str, Any]:
        """What the journal's head says of the session."""
        return {
            "step": self.trainer.step,
            "accumulated": self.trainer.accumulated,
            "trainable": self.trainer.num_trainable_parameters,
            **self.extra_state(),
        }

    def _forward_backward(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        result = self.trainer.forward_backward(
            unpack_rows(body["rows"]),
            body["loss_fn"],
            body["loss_kwargs"],
            body["accumulate"],
            plan=self._plan,
            seq=taken.seq,
            logprobs=body.get("logprobs", False),
        )
        plan = result.pop("plan")
        result["metrics"]["input_tokens"] = float(taken.tokens)
        numbers = {name: result[name] for name in ("loss", "loss_sum", "num_tokens", "grad_norm")}
        return self._completed(taken, result, {**numbers, **result["metrics"]}, plan=plan)

    def _forward(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        rows = unpack_rows(body["rows"])
        if body.get("loss_fn"):
            result = self.trainer.evaluate(rows, body["loss_fn"], body["loss_kwargs"])
        else:
            result = self.trainer.forward(rows, body["top_k"])
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
        # A branch may have another rate and schedule than the run whose steps it takes again.
        result = self.trainer.optim_step(**(self._plan or options))
        plan = result.pop("plan")
        numbers = {name: result[name] for name in ("learning_rate", "grad_norm")}
        return self._completed(taken, result, {**numbers, **result["metrics"]}, plan=plan)

    def _load_state(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        manifest = artifacts.load_artifact(
            self.storage,
            body["key"],
            self.trainer,
            optimizer=body["optimizer"],
            sha256=body["sha256"],
        )
        result = {
            "step": self.trainer.step,
            "name": manifest["name"],
            "optimizer": body["optimizer"],
        }
        return self._completed(taken, result, {})

    def sampled(self, taken: Taken, result: Result) -> Outcome:
        """The outcome of a sample that has ended."""
        return self._completed(taken, result, result["metrics"])

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

    def _certificate(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        found = self.certificate()
        return self._completed(taken, found, {}, certificate=dict(found))

    def certificate(self) -> dict[str, Any]:
        """Hashes of the state at the last seq that changed it."""
        own = certificate(self.trainer.capture())
        return {**own, "state_seq": self.state_seq, "fingerprint": self._fingerprint}

    def _complete(self, taken: Taken, body: dict[str, Any]) -> Outcome:
        manifest = self._save(taken, body["name"] or "final", "adapter") if body["save"] else None
        result = {"step": self.trainer.step, "artifact": manifest["name"] if manifest else None}
        return self._completed(
            taken, result, {}, manifest, "completed", certificate=self.certificate()
        )

    def _save(self, taken: Taken, name: str, mode: str) -> dict[str, Any]:
        facts = {
            "run_id": self.run_id,
            "seq": taken.seq,
            "operation": taken.tag,
            "base_model": self.base_model,
            "config": self.config,
        }
        return artifacts.save_adapter(self.storage, self.trainer, name, mode, facts)

    def _completed(
        self,
        taken: Taken,
        result: Result,
        metrics: dict[str, float],
        artifact: dict[str, Any] | None = None,
        close_status: str = "",
        certificate: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
    ) -> Outcome:
        now = time.time()
        result["seq"] = taken.seq or None
        result["timings"] = {
            "queued_ms": round(max(0.0, taken.started_at - taken.submitted_at) * 1e3, 3),
            "execute_ms": round(max(0.0, now - taken.started_at) * 1e3, 3),
        }
        data: dict[str, Any] = {"step": self.trainer.step, "metrics": metrics}
        if artifact is not None:
            data["artifact"] = artifact
        if certificate is not None:
            data["certificate"] = certificate
        body = json.dumps(result, allow_nan=False, separators=(",", ":")).encode()
        record: dict[str, Any] = {"numbers": metrics, "fingerprint": self._fingerprint_id}
        if plan is not None:
            record["plan"] = plan
        hit("computed", taken.kind)
        return Outcome(
            "completed",
            body,
            data=data,
            state=self.state(),
            record=record,
            close_status=close_status,
        )
