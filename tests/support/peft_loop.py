"""The training loop that a researcher would write without Signal: transformers, peft and torch.optim.

What the API answers is held to it. Nothing of ours is used: not the engine, not our tokenizer code, not our
reading of chat templates; a run's first adapter comes as the PEFT folder that it saved at step 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

# The tiny model's template, with transformers' own marks around what an assistant says.
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# (input ids, target ids, weights) of one sequence.
Row = tuple[list[int], list[int], list[float]]


class PeftLoop:
    """One run: a peft model in float32, an accumulated gradient, torch's AdamW."""

    def __init__(
        self, model: Path, adapter: Path, learning_rate: float, weight_decay: float
    ) -> None:
        """`adapter` is where training starts."""
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.parameters = [one for one in self.model.parameters() if one.requires_grad]
        self.defaults = {"lr": learning_rate, "weight_decay": weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, **self.defaults)
        self._weight = 0.0

    def rows(self, batch: Sequence[Mapping[str, Any]]) -> list[Row]:
        """A batch of the API as rows."""
        return [self._row(example) for example in batch]

    def forward_backward(
        self, batch: Sequence[Mapping[str, Any]], loss_fn: str = "causal_lm"
    ) -> dict[str, float]:
        """Accumulates as the API does; its loss, loss_sum, num_tokens and grad_norm."""
        rows = self.rows(batch)
        total = torch.stack([self._nll(row) for row in rows]).sum()
        weight = sum(sum(weights) for _, _, weights in rows)
        counted = sum(one != 0 for _, _, weights in rows for one in weights)
        divisor = weight if loss_fn == "causal_lm" else 1.0
        gradients = torch.autograd.grad(total, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._weight += divisor if loss_fn == "causal_lm" else 0.0
        value = float(total.detach())
        return {
            "loss": value / (weight if loss_fn == "causal_lm" else counted),
            "loss_sum": value,
            "num_tokens": counted,
            "grad_norm": _norm(gradients) / divisor,
        }

    def optim_step(self, grad_clip_norm: float | None = None, **options: float) -> dict[str, float]:
        """A step of AdamW; `options` hold for it alone."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad /= self._weight or 1.0
        norm = _norm([one.grad for one in self.parameters])
        if grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, grad_clip_norm)
        names = {"learning_rate": "lr", "weight_decay": "weight_decay", "eps": "eps"}
        group = self.optimizer.param_groups[0]
        before = dict(group)
        group |= {names[name]: value for name, value in options.items() if name in names}
        betas = group["betas"]
        group["betas"] = (options.get("beta1", betas[0]), options.get("beta2", betas[1]))
        self.optimizer.step()
        group |= {name: before[name] for name in ("lr", "weight_decay", "eps", "betas")}
        self.optimizer.zero_grad()
        self._weight = 0.0
        return {"grad_norm": norm, "learning_rate": options.get("learning_rate", group["lr"])}

    def logprobs(
        self, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
    ) -> list[float]:
        """Of each of `tokens` after `prompt`."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
        scaled = log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
        chosen = scaled.gather(-1, torch.tensor(tokens).unsqueeze(-1))
        return list(chosen.squeeze(-1).tolist())

    def _row(self, example: Mapping[str, Any]) -> Row:
        if "tokens" in example:
            ids = list(example["tokens"])
            weights = list(example.get("weights") or [1.0] * len(ids))
            if "targets" in example:
                return ids, list(example["targets"]), weights
            return ids[:-1], ids[1:], weights[:-1]
        if "text" in example:
            ids = self.tokenizer(example["text"])["input_ids"]
            return ids[:-1], ids[1:], [1.0] * (len(ids) - 1)
        rendered = self.tokenizer.apply_chat_template(
            example["messages"],
            chat_template=MARKED_TEMPLATE,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        return ids[:-1], ids[1:], [float(one) for one in mask[1:]]

    def _nll(self, row: Row) -> Tensor:
        """One row at a time: no padding."""
        ids, targets, weights = row
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        losses = cross_entropy(logits, torch.tensor(targets), reduction="none")
        return (losses * torch.tensor(weights)).sum()


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return float(torch.cat([one.reshape(-1) for one in gradients if one is not None]).norm())
