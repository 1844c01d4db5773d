"""Certificates: equal for equal states in any process, different for any difference, as documented."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.engine.support import make_rows
from workers.canonical import canonical, digest
from workers.engine.certificate import certificate
from workers.engine.state import TrainerState
from workers.engine.trainer import Trainer

Make = Callable[..., Trainer]
SCRIPT = """
import json, sys
from tests.unit.engine.support import make_rows, make_trainer
from workers.engine.base import load_base
from workers.engine.certificate import certificate

run = make_trainer(load_base(sys.argv[1], dtype="bfloat16", threads=1))
for seed in range(3):
    run.forward_backward(make_rows((20, 7), seed=seed), "causal_lm", {})
    if seed < 2:
        run.optim_step()
print(json.dumps(certificate(run.capture())))
"""


def _example() -> TrainerState:
    facts = {
        "layout": {"kind": "lora", "r": 1, "tensors": [["ä", [2, 2]]]},
        "optimizer": {"name": "adamw", "steps": 3},
        "accumulation": {"weight": 0.1, "reduction": "mean", "calls": 2},
    }
    tensors = {
        "master": torch.tensor([1.0, -0.0, 2.5, 1e-40]),
        "exp_avg": torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16),
        "exp_avg_sq": torch.tensor([[5.0, 6.0]], dtype=torch.float64),
        "gradient": torch.tensor([0.5] * 4),
    }
    return TrainerState(tensors, facts)


def test_equal_in_every_process(tiny: Path) -> None:
    found = []
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SCRIPT, str(tiny)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=env
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert found[0]["step"] == 2 and found[0]["gradients"]


def test_spelled_as_documented() -> None:
    """Computed again from the module's words alone."""
    state = _example()
    names = {"weights": "layout", "moments": "optimizer", "gradients": "accumulation"}
    tensors = {
        "weights": ["master"],
        "moments": ["exp_avg", "exp_avg_sq"],
        "gradients": ["gradient"],
    }
    expected: dict[str, Any] = {"step": 3}
    for field, fact in names.items():
        text = json.dumps(state.facts[fact], sort_keys=True, separators=(",", ":")) + "\n"
        data = text.encode("ascii")
        for name in tensors[field]:
            tensor = state.tensors[name]
            dtype, shape = str(tensor.dtype)[6:], list(tensor.shape)
            line = f'{{"dtype":"{dtype}","name":"{name}","shape":{json.dumps(shape)}}}\n'
            data += line.replace(", ", ",").encode() + bytes(
                tensor.flatten().view(torch.uint8).tolist()
            )
        expected[field] = hashlib.sha256(data).hexdigest()
    whole = json.dumps(expected, sort_keys=True, separators=(",", ":")).encode()
    assert certificate(state) == {**expected, "sha256": hashlib.sha256(whole).hexdigest()}


def test_a_certificate_never_changes_its_spelling() -> None:
    """Certificates are kept with runs: another spelling would break the comparison with those."""
    assert certificate(_example())["sha256"] == (
        "eb3bcbecbf3b224295cd491eb4013321555a9e7810d1b1b0340968c2594c3d2c"
    )


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("master", "weights"),
        ("exp_avg", "moments"),
        ("exp_avg_sq", "moments"),
        ("gradient", "gradients"),
    ],
)
def test_one_bit_changes_its_hash_and_the_total_alone(name: str, field: str) -> None:
    first, second = certificate(_example()), _example()
    second.tensors[name].view(torch.uint8).view(-1)[1] ^= 1
    changed = certificate(second)
    assert {key for key in first if first[key] != changed[key]} == {field, "sha256"}


@pytest.mark.parametrize(
    ("fact", "key", "value", "fields"),
    [
        ("layout", "r", 2, {"weights"}),
        ("optimizer", "name", "muon", {"moments"}),
        ("optimizer", "steps", 4, {"moments", "step"}),
        ("accumulation", "weight", 0.2, {"gradients"}),
        ("accumulation", "calls", 3, {"gradients"}),
    ],
)
def test_facts_count(fact: str, key: str, value: Any, fields: set[str]) -> None:
    first, second = certificate(_example()), _example()
    second.facts[fact][key] = value
    changed = certificate(second)
    assert {name for name in first if first[name] != changed[name]} == {*fields, "sha256"}


def test_shape_and_format_count() -> None:
    first, second = certificate(_example()), _example()
    second.tensors["master"] = second.tensors["master"].view(2, 2)
    assert certificate(second)["weights"] != first["weights"]
    second.tensors["master"] = second.tensors["master"].view(4).view(torch.int32)
    assert certificate(second)["weights"] != first["weights"]


def test_no_gradients_is_said(trainer: Make) -> None:
    run = trainer()
    none = certificate(run.capture())
    assert none["gradients"] is None
    run.forward_backward(make_rows((5,)), "causal_lm", {})
    some = certificate(run.capture())
    assert some["gradients"] and some["sha256"] != none["sha256"]
    assert some["weights"] == none["weights"] and some["moments"] == none["moments"]
    run.clear_accumulation()
    assert certificate(run.capture()) == none


def test_canonical_json_has_one_spelling() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "ä"}) == b'{"a":"\\u00e4","b":[1,2.5,null]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})
