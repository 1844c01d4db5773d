"""Which layers an adapter changes, at which rank and scale: what a run's config says, held to the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from schemas.errors import SignalError
from workers.engine.linear import LoraLinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNEMBEDDING = "lm_head"
DEFAULT_TARGETS = ATTENTION + MLP
MOST_RANK = 512


@dataclass(frozen=True)
class LoraSpec:
    """Shape and start of an adapter.

    `target_modules` None means the layers of the parts that train: attention, feed-forward, unembedding.
    `rank_pattern` and `alpha_pattern` give other values to the layers whose path ends in a key, the first
    that fits, as peft does. With `rslora` the scale is alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
    """

    r: int = 32
    alpha: float = 32.0
    target_modules: tuple[str, ...] | None = None
    seed: int = 0
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = False

    def rank(self, name: str) -> int:
        """The rank of the layer at path `name`."""
        key = _fitting(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def scale(self, name: str) -> float:
        """What the adapter's output is multiplied by in the layer at path `name`."""
        key = _fitting(self.alpha_pattern, name)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def chosen_layers(spec: LoraSpec, layers: Mapping[str, LoraLinear]) -> dict[str, LoraLinear]:
    """The layers that get an adapter, by path. Raises SignalError validation_error with the field's name."""
    targets = target_names(spec, layers)
    chosen = {name: layer for name, layer in layers.items() if _leaf(name) in targets}
    for name in chosen:
        if not 1 <= spec.rank(name) <= MOST_RANK:
            raise _refused(f"A rank is 1 to {MOST_RANK}.", "lora_rank_pattern")
    _check_pattern(spec.rank_pattern, chosen, "lora_rank_pattern")
    _check_pattern(spec.alpha_pattern, chosen, "lora_alpha_pattern")
    if spec.dora and spec.dropout:
        raise _refused("Dropout together with DoRA is not supported: use 0.", "lora_dropout")
    if spec.dora and UNEMBEDDING in targets:
        raise _refused("DoRA of the unembedding is not supported.", "use_dora")
    if spec.dropout and UNEMBEDDING in targets:
        raise _refused("Dropout before the unembedding is not supported: use 0.", "lora_dropout")
    return chosen


def target_names(spec: LoraSpec, layers: Mapping[str, LoraLinear]) -> tuple[str, ...]:
    """Last parts of the paths of the chosen layers."""
    known = tuple(dict.fromkeys(_leaf(name) for name in layers))
    if spec.target_modules is None:
        return _of_parts(spec, known)
    for name in spec.target_modules:
        if name not in known:
            raise _refused(
                f"The model has no linear layer {name!r}; it has {', '.join(known)}.",
                "lora_target_modules",
            )
    return tuple(dict.fromkeys(spec.target_modules))


def _of_parts(spec: LoraSpec, known: Sequence[str]) -> tuple[str, ...]:
    wanted = (
        (ATTENTION if spec.train_attn else ())
        + (MLP if spec.train_mlp else ())
        + ((UNEMBEDDING,) if spec.train_unembed else ())
    )
    found = tuple(name for name in wanted if name in known)
    if spec.train_unembed and UNEMBEDDING not in known:
        raise _refused("This model's unembedding takes no adapter.", "train_unembed")
    if found:
        return found
    inner = tuple(name for name in known if name != UNEMBEDDING)
    if not (spec.train_attn and spec.train_mlp and inner):
        raise _refused("No layer of the model is left to train.", "train_attn")
    # Names of another family: everything that is linear.
    return inner


def _check_pattern(
    pattern: Mapping[str, float], chosen: Mapping[str, LoraLinear], param: str
) -> None:
    for key in pattern:
        if not any(_fits(key, name) for name in chosen):
            raise _refused(f"No layer with an adapter ends in {key!r}.", f"{param}.{key}")


def _fitting(pattern: Mapping[str, float], name: str) -> str | None:
    return next((key for key in pattern if _fits(key, name)), None)


def _fits(key: str, name: str) -> bool:
    return name == key or name.endswith(f".{key}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _refused(message: str, param: str) -> SignalError:
    return SignalError("validation_error", message, param=param)
