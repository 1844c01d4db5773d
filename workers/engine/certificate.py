"""A run's state as hashes: where they are equal, later operations give equal bits on equal settings.

Each of `weights`, `moments` and `gradients` is the sha256 of, in this order: the facts of that part
(the layout of the weights; the optimizer's name and steps; the accumulation's weight, reduction and calls)
as canonical JSON and a line feed; then for each tensor by name its line and its bytes. The line is
{"dtype": .., "name": .., "shape": ..} as canonical JSON and a line feed; the bytes are row-major and
little-endian. `sha256` is that of the canonical JSON of the other four fields. Canonical JSON is ASCII with
sorted keys and no space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from workers.canonical import canonical, digest
from workers.engine.state import GRADIENT, WEIGHTS, TrainerState, dtype_name, raw


def certificate(state: TrainerState) -> dict[str, Any]:
    """`weights`, `moments`, `gradients` (None when nothing is accumulated), `step` and `sha256` over these.

    Reads the state's memory in place.
    """
    facts = state.facts
    moments = {n: t for n, t in state.tensors.items() if n not in (WEIGHTS, GRADIENT)}
    accumulation = facts["accumulation"]
    parts = {
        "weights": _hash(facts["layout"], {WEIGHTS: state.tensors[WEIGHTS]}),
        "moments": _hash(facts["optimizer"], moments),
        "gradients": accumulation and _hash(accumulation, {GRADIENT: state.tensors[GRADIENT]}),
        "step": state.step,
    }
    return {**parts, "sha256": digest(parts)}


def _hash(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    hashed = hashlib.sha256(canonical(facts) + b"\n")
    for name, tensor in sorted(tensors.items()):
        line = {"name": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        hashed.update(canonical(line) + b"\n")
        hashed.update(raw(tensor))
    return hashed.hexdigest()
