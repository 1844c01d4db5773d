"""The fifty steps that every disturbed run takes, and what of their results must be equal, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STEPS = 50
SEED = 7
ROWS = [{"tokens": [(7 * i + 3 * k) % 500 + 5 for k in range(12)]} for i in range(6)]
# The sum of its losses is infinite in float32, which only the worker finds out.
TOO_LARGE = [{"tokens": [5, 6, 7], "weights": [3e38, 3e38, 3e38]}]
CONFIG: dict[str, Any] = {"base_model": "tiny", "lora_r": 4, "seed": SEED}
# What differs between two executions of the same operation and is no number of the run's.
_OWN = ("timings", "artifact_uri", "size_bytes")
_MANIFEST = ("mode", "seq", "step", "base_model", "config", "files")

Operation = dict[str, Any]


def forward(i: int) -> Operation:
    """A batch of two rows that depends on `i`."""
    return {"kind": "forward_backward", "batch_data": [ROWS[i % 5], ROWS[(i + 1) % 6]]}


def step(i: int) -> Operation:
    """An optimizer step with a learning rate of its own."""
    return {"kind": "optim_step", "learning_rate": 1e-3 * (i % 3 + 1)}


def sample(i: int) -> Operation:
    """Eight sampled tokens with their logprobs; without a seed they depend on the place in the order."""
    prompt = [9 + i % 40, 10]
    return {"kind": "sample", "prompts": [prompt], "max_tokens": 8, "stop": [], "logprobs": True}


def course(steps: int = STEPS) -> list[Operation]:
    """Accumulation in every third step, sampling in every fifth, one save, two operations that fail."""
    found: list[Operation] = []
    for i in range(steps):
        found += [forward(i)] * (1 + (i % 3 == 2)) + [step(i)]
        if i % 5 == 4:
            found.append(sample(i))
        if i == steps // 2:
            found.append({"kind": "save_state", "name": "halfway"})
            # Both must fail as they do undisturbed: on numbers, and for want of gradients.
            found += [{"kind": "forward_backward", "batch_data": TOO_LARGE}]
            found += [{**step(i), "on_error": "continue"}]
    return found


def essence(value: Any) -> Any:
    """A result without what may differ: times, names of the run, sizes of files that hold them."""
    if isinstance(value, dict):
        # A manifest also holds times and names of its own; the hashes of its files are compared.
        kept = _MANIFEST if "format" in value else tuple(value)
        return {name: essence(value[name]) for name in kept if name not in _OWN}
    if isinstance(value, list):
        return [essence(one) for one in value]
    return value


def difference(found: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """The first place where two runs differ, or None: numbers are compared as they are."""
    for at, (one, other) in enumerate(zip(found, expected, strict=False)):
        if essence(one) != essence(other):
            return f"operation {at}: {essence(one)} instead of {essence(other)}"
    if len(found) != len(expected):
        return f"{len(found)} results instead of {len(expected)}"
    return None
