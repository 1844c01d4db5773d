"""A run as it must be, in memory: the engine alone, one process, nothing that can fail.

Predicts seq, step and every number of a run from the operations that were given to it, and keeps the state
after each, so that a branch from any of them can be predicted too.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.engine.adamw import AdamWSettings
from workers.engine.base import Base, load_base
from workers.engine.certificate import certificate
from workers.engine.lora import LoraSpec
from workers.engine.state import TrainerState
from workers.engine.trainer import Trainer
from workers.text.rows import Row

NUMBERS = ("seq", "step", "loss", "loss_sum", "grad_norm", "num_tokens", "learning_rate")


def load(model: Path) -> Base:
    """The base as a worker on a CPU slot loads it."""
    return load_base(model, dtype="float32", device="cpu", threads=1)


class Oracle:
    """One run."""

    def __init__(self, base: Base, config: Mapping[str, Any]) -> None:
        """A run that has just been made."""
        self._base, self._config = base, config
        alpha, target = config.get("lora_alpha", 32.0), None
        lora = LoraSpec(r=config["lora_r"], alpha=alpha, target_modules=target, seed=config["seed"])
        self.trainer = Trainer(base, lora, AdamWSettings(3e-4, weight_decay=0.01))
        self.seq = 0
        self.states: dict[int, TrainerState] = {0: self.trainer.capture()}
        self.saved: dict[str, TrainerState] = {}

    def branch(self, at_seq: int) -> Oracle:
        """Another run that begins from the state after `at_seq`."""
        made = Oracle(self._base, self._config)
        made.trainer.restore(self.states[at_seq])
        made.states = {0: made.trainer.capture()}
        return made

    def apply(self, operation: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of the operation's answer, or its error."""
        self.seq += 1
        try:
            found = self._apply(operation)
        except Exception as error:
            found = {"error": getattr(error, "code", repr(error))}
        self.states[self.seq] = self.trainer.capture()
        return found

    def skip(self) -> None:
        """An operation that was cancelled before its turn has a place in the order and no effect."""
        self.seq += 1
        self.states[self.seq] = self.trainer.capture()

    def certificate(self) -> str:
        """What the state hashes to."""
        return str(certificate(self.trainer.capture())["sha256"])

    def _apply(self, operation: Mapping[str, Any]) -> dict[str, Any]:
        kind = operation["kind"]
        if kind == "forward_backward":
            rows = [row(example["tokens"]) for example in operation["batch_data"]]
            return self._numbers(self.trainer.forward_backward(rows, "causal_lm", {}, True))
        if kind == "optim_step":
            rate = operation.get("learning_rate")
            options = {} if rate is None else {"learning_rate": rate}
            return self._numbers(self.trainer.optim_step(**options))
        if kind == "save_state":
            self.saved[operation["name"]] = self.trainer.capture()
        return {"seq": self.seq, "step": self.trainer.step}

    def _numbers(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {"seq": self.seq} | {name: result[name] for name in NUMBERS if name in result}


def row(tokens: list[int]) -> Row:
    """What the web tier makes of `{"tokens": …}`."""
    targets = array("i", [*tokens[1:], 0])
    return Row(array("i", tokens), targets, array("f", [1.0] * (len(tokens) - 1) + [0.0]))
