"""Any causal language model of transformers as a `Decoder`: the path for architectures that are not ours.

Only safetensors are read, from the local folder, and no code that comes with a model is run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import SignalError
from workers.engine.decoder import Head, Pass, positions
from workers.engine.linear import LoraLinear, Slot, wrap_linears
from workers.engine.memory import layer_bytes

# How rows are laid out: end to end, with a mask between them that transformers makes from their positions; or
# padded to one length, for architectures whose layers would carry something from one row into the next.
_KERNELS = ("mask", "padded")


def load_pretrained(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    slot: Slot,
    kind: type[LoraLinear] = LoraLinear,
) -> Pretrained:
    """Load the model in `path`, its linear layers as `kind`. It is built without memory and filled from
    memory-mapped files, on a GPU directly there, so that the host never holds it twice. Raises
    SignalError model_load_failed when its head is not one we know."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=dtype,
        **({} if device.type == "cpu" else {"device_map": {"": device}}),
    )
    model.requires_grad_(False)
    decoder = Pretrained(model.eval(), slot, kind)
    decoder.verify_head()
    decoder.find_kernel()
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

    def __init__(self, model: Any, slot: Slot, kind: type[LoraLinear] = LoraLinear) -> None:
        """Wraps the model's linear layers in place and reads the head and the sizes off it."""
        self.causal = model
        # Before wrapping, which makes new Parameters of the same tensors.
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        output = model.get_output_embeddings()
        self.layers = wrap_linears(model, [output], slot, kind)
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.slot, self.kernel = slot, "padded"
        layer = LoraLinear(output.weight.data, None, slot, len(self.layers))
        self.head = _head(output, config, layer)
        names = {id(module): name for name, module in model.named_modules()}
        self.layers[names[id(output)]] = layer
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache_bytes_per_token = (
            2 * heads * size * config.num_hidden_layers * self.head.weight.element_size()
        )
        self._checkpointed: list[nn.Module] = []
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        sizes = (config.hidden_size, inner, config.num_attention_heads * size)
        # Autograd keeps about twice what our own layers do.
        self._layer_bytes = 2 * layer_bytes(*sizes, self.head.weight.element_size())
        self._num_layers: int = config.num_hidden_layers

    def activation_bytes(self, checkpoint: bool) -> float:
        """See Decoder.activation_bytes."""
        if not checkpoint:
            return self._num_layers * self._layer_bytes
        inputs = self._num_layers * self.hidden_size * self.head.weight.element_size()
        return inputs + self._layer_bytes

    def hidden(self, tokens: Tensor, how: Pass | None = None) -> Tensor:
        """See Decoder.hidden."""
        how = how or Pass.of(tokens)
        self._set_checkpointing(how.checkpoint)
        longest, rows = max(how.lengths), len(how.lengths)
        if all(length == longest for length in how.lengths):
            self.slot.dropout = how.dropout
            return self._run(tokens.reshape(rows, longest))
        places = positions(how.lengths, tokens.device)
        kernel = how.kernel if how.kernel in _KERNELS else self.kernel
        if kernel == "mask":
            self.slot.dropout = how.dropout
            return self._run(tokens.reshape(1, -1), places.unsqueeze(0))
        # Padded on the right: attention is causal, so no real position sees the padding.
        numbers = torch.arange(rows, device=tokens.device)
        lengths = torch.tensor(how.lengths, device=tokens.device)
        index = numbers.repeat_interleave(lengths) * longest + places
        padded = tokens.new_zeros(rows * longest).index_copy_(0, index, tokens.reshape(-1))
        self.slot.dropout = None
        if how.dropout is not None:
            parts = (how.dropout.rows, how.dropout.places)
            spread = [part.new_zeros(rows * longest).index_copy_(0, index, part) for part in parts]
            self.slot.dropout = replace(how.dropout, rows=spread[0], places=spread[1])
        return self._run(padded.view(rows, longest)).index_select(0, index)

    def _run(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Hidden states [B * T, H] of `tokens` [B, T] at `places`, by default 0, 1, .. in each row."""
        out = self.causal.base_model(input_ids=tokens, position_ids=places, use_cache=False)
        flat: Tensor = out.last_hidden_state.reshape(-1, self.hidden_size)
        return flat

    def _set_checkpointing(self, wanted: bool) -> None:
        if wanted:
            self._enable_checkpointing()
        for layer in self._checkpointed:
            # The layer alone, not its children: their dropout must stay off.
            layer.training = wanted

    def train_head(self) -> None:
        """Compute logits with the model's own output weights, which are being trained, not with constants."""
        output = self.causal.get_output_embeddings()
        bias = getattr(output, "bias", None)
        self.head = replace(self.head, weight=output.weight, bias=bias, layer=None)

    def find_kernel(self) -> None:
        """Lay rows end to end if the model then computes what it computes for each alone."""
        tokens = torch.arange(9, device=self.head.weight.device) % self.head.weight.shape[0]
        with torch.no_grad():
            alone = torch.cat(
                [self._run(part.unsqueeze(0)) for part in torch.split(tokens, [4, 5])]
            )
            try:
                together = self.hidden(tokens, Pass((4, 5), "mask"))
            except (RuntimeError, TypeError, ValueError):
                return
        near = 1e-5 if alone.dtype in (torch.float32, torch.float64) else 3e-2
        size = float(alone.abs().max())
        if torch.allclose(alone, together, rtol=near, atol=near * size):
            self.kernel = "mask"

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
        # A layer that computes itself again keeps no cache; a run that trains may have left it so.
        self._set_checkpointing(False)
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


def _head(output: Any, config: Any, layer: LoraLinear) -> Head:
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    bias = getattr(output, "bias", None)
    return Head(
        output.weight.detach(),
        None if bias is None else bias.detach(),
        scale,
        getattr(config, "final_logit_softcapping", None),
        layer,
    )
