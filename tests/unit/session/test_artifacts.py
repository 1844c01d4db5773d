"""Saved states: exact out and in, with the optimizer or without, and nothing that differs is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import SignalError
from tests.unit.engine.support import make_rows, make_trainer, same, state
from workers.canonical import digest
from workers.engine.base import Base, load_base
from workers.engine.certificate import certificate
from workers.engine.lora import Adapter, LoraSpec
from workers.engine.trainer import Trainer
from workers.session.artifacts import load_artifact, save_adapter
from workers.storage import LocalStorage
from workers.storage.manifest import describe

Make = Callable[..., Trainer]
KEY = "runs/run_1/artifacts/mine"
BATCHES = [make_rows((9, 30), seed=seed) for seed in range(5)]


def _save(storage: LocalStorage, run: Trainer, mode: str, name: str = "mine") -> dict[str, Any]:
    facts = {"run_id": "run_1", "seq": 4, "base_model": "tiny", "config": {"lora_r": 4}}
    return save_adapter(storage, run, name, mode, facts)


def _go_on(run: Trainer, first: int, last: int) -> list[dict[str, Any]]:
    results = []
    for batch in BATCHES[first:last]:
        results += [run.forward_backward(batch, "causal_lm", {}), run.optim_step()]
    return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_resumed_with_the_optimizer_is_undisturbed_and_weights_alone_are_not(
    tiny_model: Path, storage: LocalStorage, dtype: str
) -> None:
    base = load_base(tiny_model, dtype=dtype, threads=1)
    undisturbed, saved = make_trainer(base), make_trainer(base)
    _go_on(undisturbed, 0, 3)
    _go_on(saved, 0, 3)
    manifest = _save(storage, saved, "state")
    resumed, weights_only = make_trainer(base, seed=7), make_trainer(base, seed=8)
    for run, optimizer in ((resumed, True), (weights_only, False)):
        run.forward_backward(BATCHES[4], "cross_entropy", {})
        assert load_artifact(storage, KEY, run, optimizer=optimizer).items() <= manifest.items()
        assert run.accumulated == 0
        assert torch.equal(run.adapter.master, saved.adapter.master)
    assert certificate(resumed.capture()) == certificate(saved.capture())
    assert (resumed.step, weights_only.step) == (3, 0)
    assert not weights_only.optimizer.exp_avg.any() and not weights_only.optimizer.exp_avg_sq.any()
    expected, other = _go_on(undisturbed, 3, 5), _go_on(weights_only, 3, 5)
    assert _go_on(resumed, 3, 5) == expected
    assert certificate(resumed.capture()) == certificate(undisturbed.capture())
    # The first loss comes from the same weights; the step after it has other moments.
    assert other[0]["loss"] == expected[0]["loss"] and other[2]["loss"] != expected[2]["loss"]
    assert not torch.equal(weights_only.adapter.master, undisturbed.adapter.master)


def test_the_files_of_each_mode(storage: LocalStorage, trained: Make) -> None:
    plain = ["adapter_config.json", "adapter_model.safetensors"]
    for mode, files in (("adapter", plain), ("state", [*plain, "optimizer.safetensors"])):
        manifest = _save(storage, trained(), mode, mode)
        assert [file["path"] for file in manifest["files"]] == files
        assert (manifest["mode"], manifest["step"]) == (mode, 1)
        key = f"runs/run_1/artifacts/{mode}"
        assert json.loads(storage.read(f"{key}/manifest.json") or b"") == manifest
        # The same operation again finds its own folder; another is refused.
        assert _save(storage, trained(), mode, mode) == manifest
    moments = load_file(storage.root / key / "optimizer.safetensors")
    assert torch.equal(moments["exp_avg"], trained().optimizer.exp_avg)
    weights = [
        load_file(storage.root / f"runs/run_1/artifacts/{m}/{plain[1]}")
        for m in ("adapter", "state")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_save_by_two_workers_at_once_is_one(storage: LocalStorage, trained: Make) -> None:
    manifest = _save(storage, trained(), "state")
    read = storage.read
    answers = iter([None])  # the first look is before the other has saved
    storage.read = lambda key: next(answers, read(key))  # type: ignore[method-assign]
    assert _save(storage, trained(), "state") == manifest
    assert not [path for path in storage.root.glob(".aside/*/*") if path.is_dir()]


def test_an_adapter_alone_has_no_optimizer_to_load(storage: LocalStorage, trained: Make) -> None:
    _save(storage, trained(), "adapter")
    run = trained(seed=3)
    _refused(storage, run, "it has no optimizer.safetensors, being saved with the mode 'adapter'")
    load_artifact(storage, KEY, run, optimizer=False)
    assert torch.equal(run.adapter.master, trained().adapter.master)


def test_a_foreign_start_is_taken_over_exactly(
    storage: LocalStorage, base: Base, trained: Make
) -> None:
    """Also numbers that a conversion would lose: -0.0, subnormals, infinities."""
    run = trained()
    run.adapter.master[:4] = torch.tensor([-0.0, 1e-45, 3e38, -1e-40])
    _save(storage, run, "state")
    other = make_trainer(base, seed=5)
    load_artifact(storage, KEY, other, optimizer=True)
    ours, theirs = (r.adapter.master.view(torch.int32) for r in (run, other))
    assert torch.equal(ours, theirs)


def _refused(
    storage: LocalStorage,
    run: Trainer,
    named: str,
    optimizer: bool = True,
    code: str = "state_mismatch",
) -> None:
    before, counts = state(run), (run.step, run.accumulated)
    with pytest.raises(SignalError, match=named) as caught:
        load_artifact(storage, KEY, run, optimizer=optimizer)
    assert caught.value.code == code
    assert same(before, state(run)) and counts == (run.step, run.accumulated)


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 8}, "adapter_config.json.r is 4, in this run 8"),
        ({"alpha": 4.0}, "adapter_config.json.lora_alpha is 8, in this run 4"),
        ({"targets": ("q_proj",)}, "adapter_config.json.target_modules"),
    ],
)
def test_another_adapter_is_named(
    storage: LocalStorage, trained: Make, options: Any, named: str, optimizer: bool
) -> None:
    _save(storage, trained(), "state")
    _refused(storage, trained(**options), named, optimizer)


def test_another_model_or_number_format_is_named(
    storage: LocalStorage, trained: Make, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.support.tiny import make_tiny_model

    _save(storage, trained(), "state")
    double = make_trainer(load_base(tiny_model, dtype="float64", threads=1))
    _refused(
        storage, double, "the number format of model.layers.0.*'float32', in this run 'float64'"
    )
    wide = load_base(make_tiny_model(tmp_path / "wide", hidden=128), threads=1)
    _refused(
        storage, make_trainer(wide), r"the shape of model\.layers\.0\.self_attn\.q_proj\.lora_A"
    )
    deep = load_base(make_tiny_model(tmp_path / "deep", layers=3), threads=1)
    _refused(storage, make_trainer(deep), r"the tensor model\.layers\.2.* is missing")
    flat = load_base(make_tiny_model(tmp_path / "flat", layers=1), threads=1)
    _refused(storage, make_trainer(flat), r"the tensor model\.layers\.1.* is unknown")


FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "manifest.json",
)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "tear", "remove"])
def test_a_damaged_file_is_named(
    storage: LocalStorage, trained: Make, file: str, damage: str
) -> None:
    _save(storage, trained(), "state")
    path = storage.root / KEY / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "tear":
        os.truncate(path, len(data) // 2)
    else:
        path.unlink()
    gone = (file, damage) == ("manifest.json", "remove")
    for optimizer in (True, False):
        if gone:
            _refused(storage, trained(seed=2), "no such artifact", optimizer, "not_found")
        else:
            _refused(storage, trained(seed=2), file.replace(".", r"\."), optimizer)


def _rewrite(storage: LocalStorage, file: str, change: Callable[[Path], None]) -> None:
    """A file that was made differently, with a manifest that fits it."""
    folder = storage.root / KEY
    change(folder / file)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = [describe(folder, folder / one["path"]) for one in manifest["files"]]
    manifest["sha256"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.update(use_rslora=True), "use_rslora is True, in this run False"),
        (lambda config: config.update(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (lambda config: config.update(bias="all"), "bias is 'all'"),
        (lambda config: config.update(target_modules="all-linear"), "target_modules"),
        (lambda config: config.pop("r"), "the fact adapter_config.json: r is missing"),
        (lambda config: config["target_modules"].reverse(), None),
        (
            lambda config: config.update(base_model_name_or_path="elsewhere", runtime_config={}),
            None,
        ),
    ],
)
def test_a_config_that_means_other_weights_is_refused(
    storage: LocalStorage,
    trained: Make,
    change: Callable[[dict[str, Any]], object],
    named: str | None,
) -> None:
    def rewrite(path: Path) -> None:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    _save(storage, trained(), "state")
    _rewrite(storage, "adapter_config.json", rewrite)
    if named is None:
        load_artifact(storage, KEY, trained(seed=2), optimizer=True)
    else:
        _refused(storage, trained(seed=2), named)


def test_a_tensor_that_differs_is_named(storage: LocalStorage, trained: Make) -> None:
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
        def rewrite(path: Path) -> None:
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)

        return rewrite

    cases: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
        (
            "adapter_model",
            lambda t: t.pop(name),
            "the tensor model.layers.1.mlp.up_proj.* is missing",
        ),
        (
            "adapter_model",
            lambda t: t.update({"more": torch.zeros(1)}),
            "the tensor more is unknown",
        ),
        (
            "adapter_model",
            lambda t: t.update({name: t[name].half()}),
            "the number format of .*float16",
        ),
        (
            "adapter_model",
            lambda t: t.update({name: t[name].t().contiguous()}),
            "the shape of .*up_proj",
        ),
        ("optimizer", lambda t: None, "the fact layout is missing"),
    ]
    for file, change, named in cases:
        storage.delete(KEY)
        _save(storage, trained(), "state")
        _rewrite(storage, f"{file}.safetensors", changed(change))
        _refused(storage, trained(seed=2), named)


def test_flat_is_the_reverse_of_tensors(base: Base) -> None:
    adapter = Adapter(LoraSpec(r=3, target_modules=("v_proj", "down_proj")), base.decoder.layers)
    shuffled = dict(sorted(adapter.tensors().items(), reverse=True))
    flat = adapter.flat(shuffled)
    assert torch.equal(flat, adapter.master) and flat.data_ptr() != adapter.master.data_ptr()
