"""Fingerprints: what they hold, their names, and what a GPU's process is set to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from workers.engine import ENGINE
from workers.engine.base import Base, load_base
from workers.engine.determinism import CUBLAS, why_not
from workers.engine.info import fingerprint, fingerprint_id

SCRIPT = """
import json, os, sys, torch
from workers.engine.determinism import settle_cuda, why_not

gpu = torch.device("cuda")
before = why_not(gpu)
settle_cuda()
print(json.dumps({
    "before": before,
    "after": why_not(gpu),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
    "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
    "benchmark": torch.backends.cudnn.benchmark,
    "cublas": os.environ["CUBLAS_WORKSPACE_CONFIG"],
    "heavy": sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules)),
}))
"""


def test_a_cpu_is_deterministic_and_says_what_with(base: Base) -> None:
    print_ = fingerprint(base)
    assert list(print_) == [
        "engine", "torch", "cuda", "device", "instructions", "threads", "dtype",
        "quantization", "decoder", "kernels",
        "deterministic", "why_not",
    ]  # fmt: skip
    assert (print_["engine"], print_["deterministic"], print_["why_not"]) == (ENGINE, True, None)
    assert print_["decoder"] == "llama" and print_["kernels"]
    assert fingerprint(base) == print_
    assert why_not(torch.device("cpu")) is None


def test_another_decoder_or_format_is_another_fingerprint(base: Base, tiny: Path) -> None:
    theirs = fingerprint(load_base(tiny, dtype="float32", threads=1, own=False))
    assert theirs["decoder"].startswith("pretrained ")
    double = fingerprint(load_base(tiny, dtype="float64", threads=1))
    ids = {fingerprint_id(one) for one in (fingerprint(base), theirs, double)}
    assert len(ids) == 3


def test_the_id_is_of_the_fields_in_any_order(base: Base) -> None:
    print_ = fingerprint(base)
    name = fingerprint_id(print_)
    assert len(name) == 12 and int(name, 16) >= 0
    assert fingerprint_id(dict(reversed(print_.items()))) == name
    assert fingerprint_id(json.loads(json.dumps(print_))) == name
    for field in print_:
        assert fingerprint_id({**print_, field: "other"}) != name


def _settled(**env: str) -> dict[str, object]:
    """In a process of its own, since the settings are the process's. No GPU is needed to set them."""
    inherited = {key: value for key, value in os.environ.items() if key != CUBLAS}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True, text=True, timeout=120, check=False, env={**inherited, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_gpu_process_is_settled_without_heavy_imports() -> None:
    found = _settled()
    assert "are off" in str(found.pop("before")) and "attention" in str(found.pop("after"))
    assert found == {
        "deterministic": True, "warn_only": True, "tf32": [False, False], "benchmark": False,
        "cublas": ":4096:8", "heavy": [],
    }  # fmt: skip


def test_an_operators_own_cublas_setting_stays_and_is_named() -> None:
    found = _settled(CUBLAS_WORKSPACE_CONFIG=":0:0")
    assert found["cublas"] == ":0:0" and ":0:0" in str(found["after"])
