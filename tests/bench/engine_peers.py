"""The same training step twice: by plain transformers + peft, and by the engine."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workers.engine.adamw import AdamWSettings
from workers.engine.base import load_base
from workers.engine.lora import LoraSpec
from workers.engine.trainer import Trainer
from workers.text.rows import Row

Rows = Sequence[Sequence[int]]
RANK = 8
ALPHA = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_rows(lengths: Sequence[int], vocab: int = 49000) -> Rows:
    """Token ids of rows of these lengths, and the target of the last one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, vocab, (n + 1,), generator=generator).tolist() for n in lengths]


class Peer:
    """What everybody writes: AutoModelForCausalLM, get_peft_model, a padded batch, AdamW."""

    def __init__(self, model: Path, dtype: str, device: str = "cpu", config: Any = None) -> None:
        """`config` makes a model of random weights instead of loading one."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        kind = getattr(torch, dtype)
        if config is None:
            base = AutoModelForCausalLM.from_pretrained(model, dtype=kind, local_files_only=True)
        else:
            base = AutoModelForCausalLM.from_config(config, dtype=kind)
        chosen = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by an old name.
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(base.to(device), chosen).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.device = torch.optim.AdamW(trained, lr=1e-4), device

    def padded(self, rows: Rows) -> float:
        """One step on rows padded to the longest."""
        longest = max(len(row) for row in rows) - 1
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full((len(rows), longest), -100)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row) - 1] = torch.tensor(row[:-1])
            labels[number, : len(row) - 1] = torch.tensor(row[1:])
            mask[number, : len(row) - 1] = 1
        return self._step(labels, input_ids=ids, attention_mask=mask)

    def packed(self, rows: Rows) -> float:
        """One step on rows laid end to end, with the mask that transformers makes from their positions."""
        ids = torch.tensor([[token for row in rows for token in row[:-1]]])
        labels = torch.tensor([[token for row in rows for token in row[1:]]])
        places = torch.cat([torch.arange(len(row) - 1) for row in rows]).unsqueeze(0)
        return self._step(labels, input_ids=ids, position_ids=places)

    def _step(self, labels: torch.Tensor, **inputs: torch.Tensor) -> float:
        moved = {name: value.to(self.device) for name, value in inputs.items()}
        logits = self.model(**moved, use_cache=False).logits.float()
        flat = labels.to(self.device).reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(len(flat), -1), flat)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


class Engine:
    """The engine on the same rows."""

    def __init__(
        self, model: Path, dtype: str, *, checkpoint: bool = False, device: str = "cpu"
    ) -> None:
        """Loads the model."""
        lora, settings = LoraSpec(r=RANK, alpha=ALPHA), AdamWSettings(1e-4)
        base = load_base(model, dtype=dtype, device=device)
        self.run = Trainer(base, lora, settings, gradient_checkpointing=checkpoint)

    def step(self, rows: Rows) -> float:
        """One step."""
        made = [
            Row(array("i", row[:-1]), array("i", row[1:]), array("f", [1.0] * (len(row) - 1)))
            for row in rows
        ]
        loss: float = self.run.forward_backward(made, "causal_lm", {})["loss"]
        self.run.optim_step()
        return loss
