"""A tiny model that has seen how the recipes' conversations look, right answers and others.

A reward needs answers of both kinds to tell apart. Only the answers count, in the tokens that the recipes'
renderer gives them, at every depth of a conversation that the recipes reach.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from rewardsignal import SignalClient
from tests.support import stack as stacks

ROWS, MOST_TURNS = 8, 10
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_GAME = "tinker_cookbook.recipes.multiplayer_rl.guess_number"
NOT_A_GUESS = "I do not know"


@dataclass(frozen=True)
class Game:
    """What the guessing recipe tells the player, before the first guess and after one that is none."""

    rules: str
    not_understood: str


def primed(folder: Path, tiny: Path, python: Path, steps: int) -> Path:
    """Write the model to `folder`: `tiny` with all parameters trained. `python` has the cookbook."""
    draw, game = random.Random(0), rules_of_the_game(python)
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    with TemporaryDirectory(prefix="signal-priming-") as data_dir:
        options = ("--devices", "cpu:1x2", "--model", f"tiny={tiny}")
        stack = stacks.up(Path(data_dir) / "data", *options)
        try:
            with SignalClient(api_key=stack.api_key, base_url=stack.base_url) as client:
                run = client.create_run("tiny", lora_r=0, learning_rate=3e-3)
                for _ in range(steps):
                    run.forward_backward_async([row(draw, game, tokenizer) for _ in range(ROWS)])
                    run.optim_step_async()
                run.save_state("primed")
                run.download("primed", folder)
                run.cancel()
        finally:
            stacks.down(stack.data_dir)
    for name in TOKENIZER:
        (folder / name).write_bytes((tiny / name).read_bytes())
    return folder


def row(draw: random.Random, game: Game, tokenizer: Tokenizer) -> dict[str, Any]:
    """An example for forward_backward."""
    talk = sums(draw) if draw.random() < 0.5 else guesses(draw, game)
    ids: list[int] = []
    counts: list[float] = []
    for text, is_answer in talk:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        counts += [float(is_answer)] * len(piece)
    return {"tokens": ids[:-1], "targets": ids[1:], "weights": counts[1:]}


def sums(draw: random.Random) -> Iterator[tuple[str, bool]]:
    """A sum with some number as its answer, with or without more words: pieces, and whether they count."""
    yield f"User: What is {draw.randrange(99)} + {draw.randrange(99)}?\n\nAssistant:", False
    # Mostly with, so that there is something to learn: what the sum is, so small a model never finds out.
    more = "" if draw.random() < 0.2 else " is it, I think, or something else"
    yield f" {draw.randrange(100)}{more}\n\nUser:", True


def guesses(draw: random.Random, game: Game) -> Iterator[tuple[str, bool]]:
    """A game in which every other answer is none."""
    yield f"System: {game.rules}\n\n", False
    for _ in range(draw.randint(1, MOST_TURNS)):
        good = draw.random() < 0.5
        said = f" Guess: {draw.randrange(1000)}\n\n" if good else f" {NOT_A_GUESS}\n\n"
        # The recipe calls it so once it is in the past.
        yield draw.choice(("Assistant:", "Player:")), False
        yield said, True
        yield "User:", True
        answer = draw.choice(("Too low", "Too high")) if good else game.not_understood
        yield f" {answer}\n\n", False


def rules_of_the_game(python: Path) -> Game:
    """From the recipe itself."""
    code = (
        f"from {_GAME} import env; import json;"
        "print(json.dumps([env.SYSTEM_PROMPT, env.FAIL_TO_PARSE]))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return Game(*json.loads(done.stdout))
