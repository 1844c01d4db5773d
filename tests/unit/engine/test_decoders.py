"""Our own forward pass against transformers', for each family, with and without a cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from schemas.errors import SignalError
from tests.support.tiny import make_tiny_model
from tests.unit.engine.support import gradient, make_rows, make_trainer
from workers.engine.base import Base, load_base
from workers.engine.llama import supports

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "use_sliding_window": False},
}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _family(folder: Path, changes: Mapping[str, Any]) -> Path:
    """A tiny model with a config changed, and the weights that it then has besides."""
    make_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text()) | dict(changes)
    config["architectures"] = [f"{_CLASSES[config['model_type']]}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | _extra(config, weights), folder / "model.safetensors", {"format": "pt"})
    return folder


def _extra(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    biased = ["q_proj", "k_proj", "v_proj"] if config["model_type"] == "qwen2" else []
    if config["attention_bias"]:
        biased = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    extra: dict[str, Any] = {}
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in biased:
            extra[f"{module}.bias"] = rng.normal(0, 0.5, value.shape[0]).astype(np.float32)
        if config["model_type"] == "qwen3" and module.endswith(("q_proj", "k_proj")):
            norm = module.replace("_proj", "_norm")
            extra[f"{norm}.weight"] = rng.uniform(0.5, 2, config["head_dim"]).astype(np.float32)
    if not config["tie_word_embeddings"]:
        shape = weights["model.embed_tokens.weight"].shape
        extra["lm_head.weight"] = rng.normal(0, 0.1, shape).astype(np.float32)
    return extra


@pytest.mark.parametrize("family", FAMILIES)
def test_our_forward_pass_equals_transformers(tmp_path: Path, family: str) -> None:
    folder = _family(tmp_path / "model", FAMILIES[family])
    own, theirs = (
        load_base(folder, dtype="float32", threads=1, own=which) for which in (True, False)
    )
    assert type(own.decoder) is not type(theirs.decoder)
    assert own.decoder.num_parameters == theirs.decoder.num_parameters
    assert list(own.decoder.layers) == list(theirs.decoder.layers)
    assert own.decoder.cache_bytes_per_token == theirs.decoder.cache_bytes_per_token
    rows = make_rows((70, 33), seed=4)
    runs = [make_trainer(base) for base in (own, theirs)]
    first, second = (run.forward_backward(rows, "causal_lm", {}, True) for run in runs)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    one, two = (gradient(run) for run in runs)
    assert float((one - two).norm() / two.norm()) < 1e-4
    for base in (own, theirs):
        _check_cache(base)


def _check_cache(base: Base) -> None:
    """Prefill and decoding give the hidden states of the plain forward pass, padded or not."""
    tokens = torch.randint(4, 512, (2, 12), generator=torch.Generator().manual_seed(1))
    short = tokens[1, :9]
    with torch.inference_mode():
        plain = base.decoder.hidden(tokens[:1]).view(12, -1)
        padless = base.decoder.hidden(short.unsqueeze(0)).view(9, -1)
        ragged = [tokens[0, :8].tolist(), short[:5].tolist()]
        hidden, cache = base.decoder.prefill(ragged, 4)
        for step in range(4):
            assert torch.allclose(hidden[0], plain[7 + step], atol=1e-4)
            assert torch.allclose(hidden[1], padless[4 + step], atol=1e-4)
            hidden = base.decoder.decode(torch.stack((tokens[0, 8 + step], short[5 + step])), cache)
        last, cache = base.decoder.prefill(tokens[:, :6].tolist(), 1)
        doubled = base.decoder.decode(tokens[:, 6].repeat_interleave(2), cache.repeat(2))
        picked = base.decoder.decode(tokens[1:, 6], cache.select(torch.tensor([1])))
        assert torch.allclose(last[0], plain[5], atol=1e-4)
        assert torch.allclose(doubled[1], plain[6], atol=1e-4)
        assert torch.allclose(doubled[3], picked[0], atol=1e-4)


def test_configs_that_we_do_not_compute_go_to_transformers(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    assert supports(config)
    for change in (
        {"model_type": "gemma2"},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "mistral"},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"quantization_config": {"quant_method": "gptq"}},
    ):
        assert not supports(config | change)


def test_checkpointing_works_on_transformers_too(tiny: Path) -> None:
    base = load_base(tiny, dtype="float32", threads=1, own=False)
    plain, saving = make_trainer(base), make_trainer(base, gradient_checkpointing=True)
    rows = make_rows((8, 5), seed=1)
    for run in (plain, saving, plain):
        run.forward_backward(rows, "causal_lm", {}, False)
    assert torch.allclose(gradient(plain), gradient(saving), rtol=1e-6, atol=1e-7)


def test_a_folder_with_missing_or_unknown_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name in ("model.norm.weight", "model.extra"):
        folder = make_tiny_model(tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        if weights.pop(name, None) is None:
            weights[name] = np.ones(2, np.float32)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(SignalError, match=name) as caught:
            load_base(folder)
        assert caught.value.code == "model_load_failed"


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(SignalError, match=r"mlp\.gate_proj\.weight has the shape") as error:
        load_base(folder)
    assert error.value.code == "model_load_failed"
