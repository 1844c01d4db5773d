"""The cookbook's loop for arithmetic, by the SDK alone: questions in groups, rewards, advantages, steps.

`make cookbook` runs the recipe itself on a model that can read; here a random model learns to answer digits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinker import types
from tokenizers import Tokenizer

from tests.contract.tinker.support import MODEL, params, tensor

STEPS, QUESTIONS, GROUP = 15, 8, 16
PREFIX = "Human: What is 4 + 5?\n\nAssistant: 9\n\n"
STEP = types.AdamParams(learning_rate=2e-2)


def reward_of(text: str, answer: int) -> float:
    """The cookbook's, with a part for any digit: a random model must find something to begin with."""
    digit = text.strip()
    return 0.0 if digit not in list("0123456789") else 0.5 + 0.5 * (int(digit) == answer)


def datum(prompt: Sequence[int], sequence: Any, advantage: float) -> types.Datum:
    """Prompt positions carry zeros, as the cookbook writes them."""
    tokens, before = list(sequence.tokens), len(prompt) - 1
    inputs = {
        "target_tokens": tensor([*prompt[1:], *tokens], "int64"),
        "logprobs": tensor([0.0] * before + list(sequence.logprobs)),
        "advantages": tensor([0.0] * before + [advantage] * len(tokens)),
    }
    ids = [*prompt, *tokens[:-1]]
    return types.Datum(model_input=types.ModelInput.from_ints(ids), loss_fn_inputs=inputs)


def iteration(model: Any, tokenizer: Tokenizer, chance: random.Random) -> float:
    """One batch of groups, one step; the mean reward."""
    sampler = model.save_weights_and_get_sampling_client().result()
    asked = []
    for _ in range(QUESTIONS):
        x, y = chance.randrange(5), chance.randrange(5)
        text = f"{PREFIX}Human: What is {x} + {y}?\n\nAssistant: "
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
        one_token = params(max_tokens=1, seed=chance.randrange(2**31))
        future = sampler.sample(types.ModelInput.from_ints(prompt), GROUP, one_token)
        asked.append((prompt, x + y, future))
    data, rewards = [], []
    for prompt, answer, future in asked:
        sequences = future.result().sequences
        mine = [reward_of(tokenizer.decode(list(one.tokens)), answer) for one in sequences]
        mean = sum(mine) / len(mine)
        rewards.append(mean)
        data += [
            datum(prompt, one, reward - mean)
            for one, reward in zip(sequences, mine, strict=True)
            if reward != mean
        ]
    if data:
        loss = model.forward_backward(data, "importance_sampling")
        model.optim_step(STEP).result()
        loss.result()
    return sum(rewards) / len(rewards)


def test_the_reward_rises(service: Any, tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    model = service.create_lora_training_client(base_model=MODEL, rank=32, seed=1).result()
    chance = random.Random(0)
    rewards = [iteration(model, tokenizer, chance) for _ in range(STEPS)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2, rewards
