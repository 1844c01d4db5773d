"""Any causal language model of transformers as a `Decoder`: the path for architectures that are not ours.

Only safetensors are read, from the local folder, and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import SignalError
from workers.engine.decoder import Head
from workers.engine.lora import Slot, wrap_linears


def load_pretrained(path: Path, dtype: torch.dtype, device: torch.device, slot: Slot) -> Pretrained:
    """Load the model in `path`. Raises SignalError model_load_failed when its head is not one we know."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=dtype
    )
    model.requires_grad_(False)
    decoder = Pretrained(model.to(device).eval(), slot)
    decoder.verify_head()
    return decoder


class PretrainedCache:
    """transformers' cache with what it does not keep itself: lengths and padding."""

    def __init__(self, entries: Any, length: int, pads: Tensor | None) -> None:
        """`entries` is a DynamicCache of `length` positions."""
        self.entries, self.length, self.pads = entries, length, pads

    def repeat(self, times: int) -> PretrainedCache:
        """Each row `times` times, copies side by side."""
        entries = copy.deepcopy(self.entries)
        entries.batch_repeat_interleave(times)
        pads = None if self.pads is None else self.pads.repeat_interleave(times)
        return PretrainedCache(entries, self.length, pads)

    def select(self, rows: Tensor) -> PretrainedCache:
        """Only these rows, in this order."""
        entries = copy.deepcopy(self.entries)
        entries.batch_select_indices(rows)
        return PretrainedCache(entries, self.length, None if self.pads is None else self.pads[rows])


class Pretrained:
    """A `Decoder` around `model`, a transformers causal language model in eval mode."""

    def __init__(self, model: Any, slot: Slot) -> None:
        """Wraps the model's linear layers in place and reads the head and the sizes off it."""
        self.causal = model
        # Before wrapping, which makes new Parameters of the same tensors.
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.layers = wrap_linears(model, [model.get_output_embeddings()], slot)
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.head = _head(model, config)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache_bytes_per_token = (
            2 * heads * size * config.num_hidden_layers * self.head.weight.element_size()
        )
        self._checkpointed: list[nn.Module] = []

    def hidden(self, tokens: Tensor, *, checkpoint: bool = False) -> Tensor:
        """See Decoder.hidden."""
        if checkpoint:
            self._enable_checkpointing()
        for layer in self._checkpointed:
            # The layer alone, not its children: their dropout must stay off.
            layer.training = checkpoint
        out = self.causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        flat: Tensor = out.reshape(-1, self.hidden_size)
        return flat

    def prefill(
        self, prompts: Sequence[Sequence[int]], room: int
    ) -> tuple[Tensor, PretrainedCache]:
        """See Decoder.prefill; padded on the left, as every architecture of transformers allows."""
        from transformers import DynamicCache

        width = max(len(prompt) for prompt in prompts)
        rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        device = self.head.weight.device
        pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        ragged = any(len(prompt) != width for prompt in prompts)
        entries = DynamicCache(config=self.causal.config)
        cache = PretrainedCache(entries, 0, pads if ragged else None)
        return self._extend(torch.tensor(rows, device=device), cache), cache

    def decode(self, tokens: Tensor, cache: PretrainedCache) -> Tensor:
        """See Decoder.decode."""
        return self._extend(tokens.unsqueeze(1), cache)

    def _extend(self, tokens: Tensor, cache: PretrainedCache) -> Tensor:
        places = torch.arange(cache.length + tokens.shape[1], device=tokens.device)
        mask, positions = None, places[cache.length :].unsqueeze(0).expand(len(tokens), -1)
        if cache.pads is not None:
            mask = (places >= cache.pads.unsqueeze(1)).long()
            positions = (positions - cache.pads.unsqueeze(1)).clamp(min=0)
        out = self.causal.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache.entries,
            use_cache=True,
        )
        cache.length += tokens.shape[1]
        last: Tensor = out.last_hidden_state[:, -1]
        return last

    def _enable_checkpointing(self) -> None:
        if self._checkpointed:
            return
        if not self.causal.supports_gradient_checkpointing:
            raise SignalError(
                "not_supported",
                "This model cannot recompute its layers.",
                param="gradient_checkpointing",
            )
        self.causal.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
        # Only adapters are trained: nothing flows back to the embeddings.
        self.causal.disable_input_require_grads()
        self._checkpointed = [
            module
            for module in self.causal.modules()
            if getattr(module, "gradient_checkpointing", False)
        ]

    def verify_head(self) -> None:
        """Compare our head with the model's own logits on a few tokens.

        An architecture that does more to its logits than we know would train on wrong numbers.
        """
        tokens = torch.arange(4, device=self.head.weight.device).unsqueeze(0)
        with torch.no_grad():
            theirs = self.causal(input_ids=tokens, use_cache=False).logits[0].float()
            ours = self.head.logits(self.hidden(tokens)).float()
        if not torch.allclose(theirs, ours, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise SignalError(
                "model_load_failed",
                f"The output head of {type(self.causal).__name__} is not one that this server computes.",
            )


def _head(model: Any, config: Any) -> Head:
    output = model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    bias = getattr(output, "bias", None)
    return Head(
        output.weight.detach(),
        None if bias is None else bias.detach(),
        scale,
        getattr(config, "final_logit_softcapping", None),
    )
