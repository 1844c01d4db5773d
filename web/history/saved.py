"""Saved states that a run may go on from: found by their owner, and compared with the run. No Flask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.errors import Detail, SignalError
from schemas.run_config import TARGETS, UNEMBEDDING, chosen_targets
from workers.canonical import digest
from workers.catalogue import ModelEntry
from workers.storage import Storage, artifact_key
from workers.storage.manifest import Damaged, read_sealed
from workers.storage.protocol import MANIFEST

FORMAT = "signal-artifact/1"
NO_ARTIFACT = "The run has no such artifact."

# What else shapes the weights, and what configurations of earlier versions mean.
_SHAPING: Mapping[str, Any] = {
    "lora_rank_pattern": {},
    "lora_alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}


@dataclass(frozen=True)
class Saved:
    """A saved state. `sha256` is its manifest's own seal."""

    run_id: str
    name: str
    key: str
    sha256: str
    manifest: dict[str, Any]


def find_saved(storage: Storage, run_id: str, name: str, param: str) -> Saved:
    """The state that a run of one's own saved under `name`; storage knows it before SQL does.

    Raises SignalError not_found, or state_mismatch when it is damaged; both name `param`.
    """
    key = artifact_key(run_id, name)
    if storage.stat(f"{key}/{MANIFEST}") is None:
        raise SignalError("not_found", NO_ARTIFACT, param=param)
    try:
        manifest = read_sealed(storage, key, FORMAT)
    except Damaged as damage:
        text = f"The saved state {name!r} is damaged: {damage}."
        raise SignalError("state_mismatch", text, param=param) from damage
    return Saved(run_id, name, key, digest(manifest), manifest)


def check_fits(
    saved: Saved, config: Mapping[str, Any], model: ModelEntry, *, optimizer: bool, path: str = ""
) -> None:
    """Refuse a saved state that is not of this model and adapter, every field that differs by its name.

    Raises SignalError state_mismatch; `path` goes before the names. Names, shapes and hashes of the
    tensors are checked by the worker, which reads them.
    """
    found = [
        Detail(f"{path}{field}", "state_mismatch", text)
        for field, text in _differences(saved.manifest, config, model, optimizer)
    ]
    if found:
        text = " ".join(detail.message for detail in found)
        raise SignalError("state_mismatch", text, param=found[0].param, details=found)


def _differences(
    manifest: Mapping[str, Any], config: Mapping[str, Any], model: ModelEntry, optimizer: bool
) -> Iterator[tuple[str, str]]:
    then = manifest["config"]
    if manifest["base_model"] != model.name:
        yield "base_model", f"It was saved from {manifest['base_model']!r}, not {model.name!r}."
        return
    for field in ("lora_r", "lora_alpha"):
        if then[field] != config[field]:
            yield field, f"It was saved with {field} {then[field]:g}, not {config[field]:g}."
    for field, default in _SHAPING.items():
        before, now = then.get(field) or default, config.get(field) or default
        if before != now:
            yield field, f"It was saved with {field} {before!r}, not {now!r}."
    if _targets(then, model) != _targets(config, model):
        yield "lora_target_modules", "It was saved with an adapter on other layers."
    if optimizer and manifest["mode"] != "state":
        yield (
            "optimizer",
            f"It was saved with the mode {manifest['mode']!r}, without the optimizer: use optimizer=false.",
        )


def _targets(config: Mapping[str, Any], model: ModelEntry) -> set[str]:
    trainable = {name for name in TARGETS if name in model.linear_widths}
    return set(chosen_targets(config)) & {*trainable, UNEMBEDDING}
