"""Training every parameter of a model, on a base that no other run shares.

The model's own Parameters become views of the flat vector, so that whatever an architecture computes with
them is differentiated by autograd. The bare base is gone: what compares with it is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.linear import Slot
from workers.engine.parameters import Parameters, Shapes, Weights, master_dtype
from workers.engine.pretrained import Pretrained
from workers.engine.spans import Terms
from workers.engine.state import dtype_name
from workers.engine.targets import LoraSpec


class FullWeights(Parameters):
    """All parameters of a base, by transformers' names."""

    targets: tuple[str, ...] = ()

    def __init__(self, spec: LoraSpec, base: Base) -> None:
        """Takes the base over. Raises SignalError not_supported where that cannot be."""
        decoder = _decoder(base)
        found = dict(decoder.causal.named_parameters())
        shapes: Shapes = [(name, tuple(tensor.shape)) for name, tensor in found.items()]
        wide = master_dtype(base.dtype)
        layout = {
            "kind": "full",
            "dtype": dtype_name(wide),
            "tensors": [[name, list(shape)] for name, shape in shapes],
        }
        with torch.no_grad():
            master = torch.cat([tensor.reshape(-1).to(wide) for tensor in found.values()])
        super().__init__(spec, shapes, layout, master, base.dtype)
        self.config = dict(base.config)
        self._binding = _Binding(list(found.values()))
        self._own = self.views(self._compute)
        self._binding.bind(self._own)
        self.leaves = _trained(self._binding.parameters)
        decoder.train_head()
        base.bare = False

    @property
    def terms(self) -> Terms:
        """See Weights.terms."""
        return None

    def activate(self, slot: Slot) -> None:
        """See Weights.activate: they are in their place, unless frozen ones were."""
        slot.terms = None
        self._binding.bind(self._own)

    def _copied(self, compute: Tensor) -> Weights:
        return _FrozenWeights(self._binding, self.views(compute))


class _Binding:
    """The parameters of a model, and whose numbers they are at present."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._bound: list[Tensor] = []

    def bind(self, views: list[Tensor]) -> None:
        """Have the model compute with `views`."""
        if self._bound is views:
            return
        self._bound = views
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view.detach()


class _FrozenWeights:
    """All parameters of a base as they were at one moment."""

    terms: Terms = None

    def __init__(self, binding: _Binding, views: list[Tensor]) -> None:
        self._binding, self._views = binding, views

    def activate(self, slot: Slot) -> None:
        """See Weights.activate."""
        slot.terms = None
        self._binding.bind(self._views)

    def frozen(self) -> _FrozenWeights:
        """See Weights.frozen."""
        return self


def _decoder(base: Base) -> Pretrained:
    if base.quantization is not None:
        message = "All parameters cannot be trained in few bits: use an adapter (lora_r)."
        raise SignalError("not_supported", message, param="quantization")
    if not isinstance(base.decoder, Pretrained) or not base.bare:
        raise SignalError(
            "not_supported",
            "All parameters are trained on a base of transformers' that no other run uses.",
            param="lora_r",
        )
    return base.decoder


def _trained(parameters: list[nn.Parameter]) -> list[Tensor]:
    """What gradients are taken by."""
    for parameter in parameters:
        parameter.requires_grad_()
    return list(parameters)
