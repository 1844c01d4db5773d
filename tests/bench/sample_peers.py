"""What sampling is compared with: transformers' generate and generate_batch on the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Prompts = Sequence[Sequence[int]]


class Generate:
    """transformers' model in bfloat16; nothing ends a row but its length."""

    def __init__(self, model: Path) -> None:
        """Loads the model."""
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, local_files_only=True
        ).eval()

    def adapted(self, rank: int) -> None:
        """Add an adapter to every linear layer, as peft does."""
        from peft import LoraConfig, get_peft_model

        leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by an old name.
            warnings.simplefilter("ignore", FutureWarning)
            chosen = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(leaves))
            self.model = get_peft_model(self.model, chosen)

    def batch(
        self, prompts: Prompts, tokens: int, *, static: bool = False, n: int = 1
    ) -> torch.Tensor:
        """Sample from all of the distribution, prompts padded on the left."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, prompt in enumerate(prompts):
            ids[number, longest - len(prompt) :] = torch.tensor(prompt)
            mask[number, longest - len(prompt) :] = 1
        with torch.no_grad():
            out: torch.Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._settings(tokens, static, n),
            )
        assert out.shape == (n * len(prompts), longest + tokens)
        return out

    def continuous(self, prompts: Prompts, tokens: int) -> None:
        """Their continuous batch on the same prompts, its cache as large as it must be."""
        from transformers import ContinuousBatchingConfig

        cache = ContinuousBatchingConfig(num_blocks=256, page_size=32, max_batch_tokens=512)
        found = self.model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=self._settings(tokens, False, 1),
            continuous_batching_config=cache,
            progress_bar=False,
        )
        assert all(len(one.generated_tokens) == tokens for one in found.values())

    def _settings(self, tokens: int, static: bool, n: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            num_return_sequences=n,
            pad_token_id=0,
            eos_token_id=None,
            cache_implementation="static" if static else None,
            disable_compile=True,
        )
