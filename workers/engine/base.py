"""A base model in memory: frozen weights, wrapped once for adapters, and the facts about it.

Several runs may share one base; `activated` decides whose adapter computes, and `set_aside` lets another's
compute in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import SignalError
from workers.engine import determinism, llama
from workers.engine.decoder import Decoder
from workers.engine.linear import Slot
from workers.engine.memory import Budget, release_freed
from workers.engine.parameters import Weights
from workers.engine.quantized import check_quantization, linear_class
from workers.engine.weights import FolderTensors

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Base:
    """A loaded model; `config` is its config.json."""

    decoder: Decoder
    slot: Slot
    config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    quantization: str | None = None
    # Whether its weights are those of its folder; a run that trains all of them takes it over.
    bare: bool = True
    # Called where a long operation may stand still for a moment: between two of its micro-batches.
    pause: Callable[[], None] = lambda: None

    def new_budget(self) -> Budget:
        """One run's own: micro-batches begin by an estimate of what a token takes, and what a run learns of
        its memory changes no other's plans."""
        per_token = {which: self.decoder.activation_bytes(which) for which in (False, True)}
        return Budget(self.device, per_token)

    @property
    def dtype_name(self) -> str:
        """The dtype as the API names it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this minus 1."""
        return int(self.config["vocab_size"])

    @property
    def context_length(self) -> int:
        """The longest sequence the model takes, prompt and continuation together."""
        return int(self.config["max_position_embeddings"])

    @contextmanager
    def activated(self, adapter: Weights | None) -> Iterator[None]:
        """Compute with `adapter` inside the block; with None, as the bare base.

        Raises SignalError not_supported when there is no bare base any more.
        """
        if adapter is not None:
            adapter.activate(self.slot)
        elif not self.bare:
            raise SignalError(
                "not_supported",
                "A run that trains all parameters keeps no reference model: give ref_logprobs.",
            )
        try:
            yield
        finally:
            self.slot.terms = self.slot.dropout = None

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Another run's operation may compute inside the block, as if nothing were under way; afterwards the
        one under way goes on where it stood."""
        kept = self.slot.terms, self.slot.dropout
        self.slot.terms = self.slot.dropout = None
        try:
            # What stands still may be in the middle of a pass without a derivative.
            with torch.enable_grad():
                yield
        finally:
            self.slot.terms, self.slot.dropout = kept


def load_base(
    path: Path | str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    own: bool = True,
    quantization: str | None = None,
) -> Base:
    """Load the model in folder `path` from safetensors, without network and without code of its own.

    `dtype` is a name of DTYPES or "auto": bfloat16 on a GPU, float32 on a CPU. `threads` sets torch's
    CPU threads for the process; a GPU sets the process to deterministic kernels (`determinism`).
    `own=False` uses transformers even where we have a forward pass. `quantization` keeps the linear layers in
    "nf4" or "int8". Raises SignalError not_supported with the setting's name, model_load_failed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    folder, where = Path(path), torch.device(device)
    if where.type == "cuda":
        determinism.settle_cuda()
    kind = DTYPES[{"cuda": "bfloat16"}.get(where.type, "float32") if dtype == "auto" else dtype]
    config = _read_json(folder / "config.json")
    if quantization is not None:
        check_quantization(quantization, where, kind)
    slot, layer = Slot(), linear_class(quantization)
    decoder: Decoder
    if own and llama.supports(config):
        decoder = llama.Llama(config, FolderTensors(folder, kind, where), slot, layer)
    else:
        from workers.engine.pretrained import load_pretrained

        decoder = load_pretrained(folder, kind, where, slot, layer)
    release_freed()
    if not decoder.layers:
        raise SignalError(
            "model_load_failed", "The model has no linear layer that could take an adapter."
        )
    return Base(decoder, slot, config, kind, where, _eos(folder, config), quantization)


def _eos(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    found = (_read_json(generation) if generation.is_file() else {}).get(
        "eos_token_id", config.get("eos_token_id")
    )
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def _read_json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded
