"""Linear layers that take an adapter: every one of a base is wrapped once, an adapter is switched on by one
assignment.

y = base(x) + scale * (drop(x) A^T) B^T, and with DoRA (Liu et al., arXiv 2402.09353) the rows of the sum are
brought to learnt lengths: y = magnitude / norm * (x W^T + scale * (x A^T) B^T) + bias, where `norm` is the
length of each row of W + scale * B A, a constant in the derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from schemas.errors import SignalError
from workers.engine.dropout import Dropout


class Term(NamedTuple):
    """What an adapter adds to one layer: `a` [r, in], `b` [out, r]; with DoRA `magnitude`, `norm` and their
    `ratio` [out], the latter two in float32 at least."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    ratio: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken by."""
        return [self.a, self.b] if self.magnitude is None else [self.a, self.b, self.magnitude]

    def scaled(self, y: Tensor) -> Tensor:
        """`y` [..., out] brought to its learnt lengths, differentiable in both; `y` itself without DoRA."""
        if self.magnitude is None or self.norm is None or self.ratio is None:
            return y
        # The ratio's own value: that of a magnitude in 16 bits would be too coarse.
        gain = self.ratio + (self.magnitude - self.magnitude.detach()) / self.norm
        return (y * gain).to(y.dtype)


class Slot:
    """What the wrapped layers of one base look at: the terms of the active adapter, by layer number."""

    def __init__(self) -> None:
        """No adapter is active at first."""
        self.terms: Sequence[Term | None] | None = None
        # Of the pass that is running, for the layers that autograd differentiates.
        self.dropout: Dropout | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the active adapter's term; without one it is the base layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, slot: Slot, index: int) -> None:
        """Shares `weight` [out, in] and `bias` [out] with the base; `index` is its place in `slot.terms`."""
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.slot, self.index = slot, index
        self.hold(weight)

    def hold(self, weight: Tensor) -> None:
        """Keep the weight; a subclass keeps it in fewer bits."""
        self.weight = nn.Parameter(weight, requires_grad=False)

    @cached_property
    def weight_t(self) -> Tensor:
        """[in, out], of a layer whose weight stays where it is: made once, since a small model's step is made
        of hundreds of such calls."""
        return self.weight.detach().t()

    @property
    def term(self) -> Term | None:
        """What the active adapter adds here."""
        return None if self.slot.terms is None else self.slot.terms[self.index]

    def plain(self, x: Tensor) -> Tensor:
        """The base layer's product without its bias: [..., in] -> [..., out]."""
        return functional.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y, term = self.plain(x), self.term
        if term is not None:
            y = y + term.scale * functional.linear(
                functional.linear(self._dropped(x), term.a), term.b
            )
            y = term.scaled(y)
        return y if self.bias is None else y + self.bias

    def _dropped(self, x: Tensor) -> Tensor:
        dropout = self.slot.dropout
        if dropout is None:
            return x
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != len(dropout.rows):
            raise SignalError(
                "not_supported",
                "This model shows its layers tokens in another order than they are given in, so that "
                "dropout cannot be repeated: use lora_dropout 0.",
                param="lora_dropout",
            )
        return dropout.apply(flat, dropout.keep(self.index, self.in_features)).view(x.shape)


def wrap_linears(
    root: nn.Module, skip: Sequence[nn.Module], slot: Slot, kind: type[LoraLinear] = LoraLinear
) -> dict[str, LoraLinear]:
    """Replace every nn.Linear under `root` (but those in `skip`) in place; by module path, in order."""
    found = [
        (name, module) for name, module in root.named_modules() if isinstance(module, nn.Linear)
    ]
    wrapped: dict[str, LoraLinear] = {}
    for name, module in found:
        if any(module is other for other in skip):
            continue
        bias = None if module.bias is None else module.bias.data
        layer = kind(module.weight.data, bias, slot, len(wrapped))
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, layer)
        wrapped[name] = layer
    return wrapped
