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
from workers.engine.parameters import Parameters, Shapes, master_dtype
from workers.engine.pretrained import Pretrained
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
        self.leaves = _bind(list(found.values()), self.views(self._compute))
        decoder.train_head()
        base.bare = False

    def activate(self, slot: Slot) -> None:
        """See Parameters.activate: they are in their place."""
        slot.terms = None


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


def _bind(parameters: list[nn.Parameter], views: list[Tensor]) -> list[Tensor]:
    """Have the model compute with `views`; what gradients are taken by."""
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view.detach()
        parameter.requires_grad_()
    return list(parameters)
