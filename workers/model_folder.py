"""What a model folder holds: facts from config.json and from the headers of its safetensors files.

Reads the folder, without torch and without reading weights. Folders that carry their weights in pickles
only are refused: loading a pickle runs code.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.text.chat import read_chat_template

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 * 1024 * 1024
# Families spell the same facts differently.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")


class ModelFolderError(ValueError):
    """The folder is not a causal language model that this server can load; says what is wrong."""


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue.

    `linear_widths` gives, by name of a matrix (`q_proj`), the sum over all layers of its inputs and
    outputs: an adapter of rank r on it has r times as many parameters.
    """

    name: str
    path: Path
    architecture: str
    family: str
    context_length: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_parameters: int
    torch_dtype: str
    has_chat_template: bool
    linear_widths: Mapping[str, int]

    def adapter_parameters(self, r: int, target_modules: Iterable[str]) -> int:
        """Trainable parameters of a LoRA of rank `r` on `target_modules`; absent ones count nothing."""
        return r * sum(self.linear_widths.get(module, 0) for module in target_modules)


def read_model_folder(name: str, folder: Path) -> ModelEntry:
    """The entry of the model in `folder`. Raises ModelFolderError."""
    config = _read_object(folder / CONFIG)
    if not (folder / TOKENIZER).is_file():
        raise ModelFolderError(
            f"{folder} has no {TOKENIZER}; save the tokenizer in the fast format first"
        )
    shapes = _read_shapes(folder)
    # Models with several modalities keep the language model's facts one level down.
    nested = config.get("text_config")
    facts = {**config, **nested} if isinstance(nested, dict) else config
    tokenizer_config = folder / "tokenizer_config.json"
    template = read_chat_template(
        folder, _read_object(tokenizer_config) if tokenizer_config.is_file() else {}
    )
    return ModelEntry(
        name=name,
        path=folder,
        architecture=str((config.get("architectures") or [config.get("model_type", "unknown")])[0]),
        family=str(config.get("model_type", "unknown")),
        context_length=_positive(facts, folder, *_CONTEXT),
        vocab_size=_positive(facts, folder, "vocab_size"),
        hidden_size=_positive(facts, folder, *_HIDDEN),
        num_layers=_positive(facts, folder, *_LAYERS),
        num_attention_heads=_positive(facts, folder, *_HEADS),
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        torch_dtype=str(facts.get("dtype") or facts.get("torch_dtype") or "float32"),
        has_chat_template=template is not None,
        linear_widths=_linear_widths(shapes),
    )


def _read_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, of the files that transformers would load."""
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        hint = "; convert its .bin files first" if any(folder.glob("*.bin")) else ""
        raise ModelFolderError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    names = set(_read_object(folder / INDEX).get("weight_map", {}).values())
    shapes: dict[str, list[int]] = {}
    for name in sorted(names):
        # The index is part of a downloaded model: it may name files beside itself only.
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelFolderError(f"{folder / INDEX} names {name!r}, which is not in the folder")
        shapes |= _read_header(folder / name)
    return shapes


def _read_header(file: Path) -> dict[str, list[int]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size, _MAX_HEADER):
            raise ModelFolderError(f"{file} is not a safetensors file")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: list(entry["shape"]) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelFolderError(f"{file} is not a safetensors file") from None
    if 8 + length + end != size:
        raise ModelFolderError(
            f"{file} has {size:,} bytes, its header says {8 + length + end:,}: copy it again"
        )
    return shapes


def _linear_widths(shapes: Mapping[str, list[int]]) -> dict[str, int]:
    widths: Counter[str] = Counter()
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(shape) == 2 and len(parts) > 1 and parts[-1] == "weight":
            widths[parts[-2]] += sum(shape)
    return dict(widths)


def _positive(facts: Mapping[str, Any], folder: Path, *names: str) -> int:
    for name in names:
        value = facts.get(name)
        if type(value) is int and value > 0:
            return value
    raise ModelFolderError(f"{folder / CONFIG} has no {' or '.join(names)}")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise ModelFolderError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelFolderError(f"{file} must hold a JSON object")
    return value
