"""The same training written with plain torch, transformers and peft: what the engine is held to.

Nothing of the engine is used here but the numbers of its adapter, which are copied over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.trainer import Trainer
from workers.text.rows import Row


def reference_model(
    folder: Path, trainer: Trainer, dtype: torch.dtype, *, full_precision: bool = True
) -> Any:
    """A peft model with the adapter's present values.

    transformers computes its norms in float32 even in a float64 model; `full_precision` mends that, since
    nothing can be compared to 1e-9 behind it.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if full_precision:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _plain_norm(module)
    spec = trainer.adapter.spec
    config = LoraConfig(
        r=spec.r,
        lora_alpha=int(spec.alpha),
        target_modules=list(trainer.adapter.targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    chosen = _parameters(peft_model, trainer)
    with torch.no_grad():
        for parameter, value in zip(chosen, trainer.adapter.tensors().values(), strict=True):
            parameter.copy_(value)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in chosen}
    return peft_model


def _plain_norm(module: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        normed: Tensor = module.weight * (x * scale)
        return normed

    return forward


def reference_loss(model: Any, rows: Sequence[Row]) -> tuple[Tensor, float]:
    """Sum of weighted negative log-likelihoods over the rows, one row at a time, and the total weight."""
    total, weight_sum = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows:
        tokens, targets = (
            torch.from_numpy(np.array(part, np.int64)) for part in (row.tokens, row.targets)
        )
        weights = torch.from_numpy(np.array(row.weights, np.float64))
        logits = model(input_ids=tokens.unsqueeze(0)).logits[0]
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total = total + (nll * weights).sum()
        weight_sum += float(weights.sum())
    return total, weight_sum


def reference_gradient(model: Any, trainer: Trainer) -> Tensor:
    """The reference's .grad in the order of the engine's flat vector."""
    return torch.cat([parameter.grad.reshape(-1) for parameter in _parameters(model, trainer)])


def reference_values(model: Any, trainer: Trainer) -> Tensor:
    """The reference's adapter as one flat vector."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in _parameters(model, trainer)])


def _parameters(model: Any, trainer: Trainer) -> list[Any]:
    found = dict(model.named_parameters())
    return [
        found[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        for name in trainer.adapter.tensors()
    ]
