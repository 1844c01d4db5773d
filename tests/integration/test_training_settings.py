"""Every setting of a run through a real stack: trained, saved, loaded, and after the loss of its worker."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import rewardsignal as rs
from tests.support.stack import RunningStack

ROWS: list[dict[str, Any]] = [{"tokens": list(range(5, 37))}, {"tokens": [9, 8, 7, 6, 5, 4]}]
SETTINGS: dict[str, dict[str, Any]] = {
    "dropout, patterns, rslora": {
        "lora_dropout": 0.1,
        "lora_rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 6},
        "lora_alpha_pattern": {"down_proj": 4.0},
        "use_rslora": True,
    },
    "dora in bfloat16, recomputed": {
        "use_dora": True,
        "bf16": True,
        "gradient_checkpointing": True,
    },
    "unembedding alone, by lion": {
        "train_attn": False,
        "train_mlp": False,
        "train_unembed": True,
        "optimizer": "lion",
    },
    "all parameters": {"lora_r": 0},
    "qlora by adamw_8bit": {"quantization": "nf4", "optimizer": "adamw_8bit"},
}


@pytest.fixture(scope="module")
def client(stack: RunningStack) -> Iterator[rs.SignalClient]:
    with rs.SignalClient(stack.new_user("settings"), stack.base_url) as found:
        yield found


def _without_library(config: dict[str, Any]) -> bool:
    needs = config.get("quantization") or config.get("optimizer") == "adamw_8bit"
    return bool(needs) and importlib.util.find_spec("bitsandbytes") is None


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_and_can_be_proved(
    client: rs.SignalClient, name: str, tmp_path: Path
) -> None:
    config = {"lora_r": 4, "learning_rate": 5e-3, "seed": 3, **SETTINGS[name]}
    if _without_library(config):
        with pytest.raises(rs.ValidationError, match="bitsandbytes"):
            client.create_run("tiny", **config)
        return
    run = client.create_run("tiny", **config)
    losses = []
    for _ in range(4):
        losses.append(run.forward_backward(ROWS).loss)
        run.optim_step()
    assert losses[-1] < losses[0]
    run.save_state("middle", mode="state")
    folder = run.download("middle", tmp_path)
    if config["lora_r"]:
        with safe_open(folder / "adapter_model.safetensors", framework="np") as saved:
            numbers = sum(math.prod(saved.get_slice(name).get_shape()) for name in saved.keys())  # noqa: SIM118
        assert run.model_info().num_trainable_parameters == numbers
    expected = "config.json" if not config["lora_r"] else "adapter_config.json"
    assert json.loads((folder / expected).read_text())
    before = run.certificate()
    run.forward_backward(ROWS)
    run.optim_step()
    run.load_state("middle")
    assert run.certificate().weights == before.weights
    run.forward_backward(ROWS)
    run.optim_step()
    # Done again from the journal by another session, with the plans that were recorded.
    assert run.replay().result().sha256 == run.certificate().sha256
    run.cancel()


def test_a_schedule_is_followed_and_a_branch_may_change_it(client: rs.SignalClient) -> None:
    run = client.create_run(
        "tiny", lora_r=4, learning_rate=1e-2, lr_scheduler="linear", warmup_steps=1, total_steps=3
    )
    rates = []
    for rate in (None, None, 0.5):
        run.forward_backward(ROWS)
        options = {} if rate is None else {"learning_rate": rate}
        rates.append(run.optim_step(**options).learning_rate)
    assert rates == pytest.approx([0.0, 1e-2, 0.5])
    branch = run.branch(lr_scheduler="constant", learning_rate=2e-3)
    assert branch.info.config["total_steps"] is None
    branch.forward_backward(ROWS)
    assert branch.optim_step().learning_rate == pytest.approx(2e-3)
    for one in (run, branch):
        one.cancel()
