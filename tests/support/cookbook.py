"""Four recipes of tinker-cookbook, unmodified and offline, against a stack; each says whether it learnt.

They run in the environment `.cookbook` (deploy/cookbook_env.py).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.cookbook_env import PYTHON
from tests.support import stack as stacks
from tests.support.cookbook_priming import primed
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

RECIPES = "tinker_cookbook.recipes"
TINY, PRIMED = "tiny/model", "primed/model"


@dataclass(frozen=True)
class Place:
    """Where the recipes run: a stack, and a folder in which models and data are found by their names."""

    stack: RunningStack
    folder: Path

    def recipe(self, name: str, log: str, **options: Any) -> list[dict[str, Any]]:
        """Run a recipe to its end; its metrics, step by step. Raises RuntimeError when it fails."""
        options |= {"renderer_name": "role_colon", "log_path": self.folder / log}
        options.setdefault("behavior_if_log_dir_exists", "delete")
        done = subprocess.run(
            [str(PYTHON), "-m", f"{RECIPES}.{name}", *(f"{k}={v}" for k, v in options.items())],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        lines = (self.folder / log / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def environment(self) -> dict[str, str]:
        """Three lines, and no network."""
        return {
            **os.environ,
            "TINKER_BASE_URL": self.stack.base_url,
            "TINKER_API_KEY": f"tml-{self.stack.api_key}",
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }


@contextmanager
def prepared(root: Path, *, priming_steps: int, **models: Path) -> Iterator[Place]:
    """A stack with a tiny model, a primed one unless it is to have 0 steps, and `models`: by owner, each
    called `model`."""
    folder = root / "here"
    found = {TINY: make_tiny_model(folder / TINY)}
    preferences(folder / "Anthropic" / "hh-rlhf")
    if priming_steps:
        found[PRIMED] = primed(folder / PRIMED, found[TINY], PYTHON, priming_steps)
    for owner, path in models.items():
        (folder / owner).mkdir()
        (folder / owner / "model").symlink_to(path.absolute())
        found[f"{owner}/model"] = folder / owner / "model"
    options = [word for name, path in found.items() for word in ("--model", f"{name}={path}")]
    # Its clients leave without a word: their places must be free for the next.
    environment = {"SIGNAL_CLIENT_GONE": "20"}
    stack = stacks.up(root / "data", "--devices", "cpu:2x1", *options, env=environment)
    try:
        yield Place(stack, folder)
    finally:
        stacks.down(stack.data_dir)


def chat_sl(place: Place, first: int = 5, last: int = 16, by: float = 1.0) -> dict[str, Any]:
    """Supervised, on the cookbook's own example file; ends after `first` steps, and is resumed up to `last`
    from its last checkpoint but one."""
    options = {
        "dataset": example_data(), "model_name": TINY, "batch_size": 32, "num_epochs": 6,
        "max_length": 512, "save_every": 2, "learning_rate": 5e-3,
    }  # fmt: skip
    place.recipe("chat_sl.train", "sl", **options, max_steps=first)
    log = place.folder / "sl" / "checkpoints.jsonl"
    # As if it had been killed before its last save.
    kept = [line for line in log.read_text().splitlines() if '"final"' not in line]
    log.write_text("\n".join(kept) + "\n")
    options["behavior_if_log_dir_exists"] = "resume"
    rows = place.recipe("chat_sl.train", "sl", **options, max_steps=last)
    steps = column(rows, "step")
    assert steps.count(first - 1) == 2, f"it did not resume at its checkpoint: {steps}"
    return moved(column(rows, "train_mean_nll"), up=False, by=by)


def dpo(place: Place, steps: int = 12) -> dict[str, Any]:
    """Preferences, with a reference that is sampled and a loss that the client computes."""
    rows = place.recipe(
        "preference.dpo.train", "dpo",
        model_name=TINY, dataset="hhh", batch_size=16, max_steps=steps, learning_rate=3e-3,
    )  # fmt: skip
    return moved(column(rows, "dpo_loss"), up=False, by=0.3)


def math_rl(place: Place, steps: int = 15, **changes: Any) -> dict[str, Any]:
    """Reinforcement learning on sums: the primed model learns to say a number and no more."""
    options = {
        "model_name": PRIMED,
        "groups_per_batch": 16,
        "max_tokens": 14,
        "learning_rate": 5e-3,
    }
    rows = place.recipe(
        "math_rl.train",
        "math",
        env="arithmetic",
        group_size=8,
        max_steps=steps,
        **options | changes,
    )
    return {
        **moved(column(rows, "env/all/reward/total"), up=True, by=0.02),
        "seconds_per_step": sorted(column(rows, "time/total"))[len(rows) // 2],
    }


def guess_number(place: Place, steps: int = 16) -> dict[str, Any]:
    """Ten turns in which every answer that is no guess costs a point."""
    rows = place.recipe(
        "multiplayer_rl.guess_number.train", "guess",
        model_name=PRIMED, batch_size=2, group_size=8, max_tokens=20, eval_every=0,
        save_every=0, max_steps=steps, learning_rate=3e-3,
    )  # fmt: skip
    return moved(column(rows, "env/all/reward/total"), up=True, by=1.0)


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    """A metric of all steps that have it."""
    return [row[name] for row in rows if name in row]


def moved(values: list[float], up: bool, by: float) -> dict[str, Any]:
    """Where it began and where it ended (means of a quarter), and whether that is as it should be."""
    part = max(1, len(values) // 4)
    first, last = sum(values[:part]) / part, sum(values[-part:]) / part
    learnt = last - first if up else first - last
    return {"from": round(first, 4), "to": round(last, 4), "n": len(values), "learns": learnt >= by}


def example_data() -> Path:
    """The file that the cookbook comes with."""
    found = PYTHON.parents[1].glob("lib/python3*/site-packages/tinker_cookbook/example_data")
    return next(found) / "conversations.jsonl"


def preferences(folder: Path) -> None:
    """Answers that begin with yes are better than those that begin with no."""
    words = sorted({"cat", "mat", "moon", "rain", "town", "old", "sat", "looked", "over", "while"})
    draw = random.Random(0)

    def row() -> str:
        question = f"\n\nHuman: {' '.join(draw.sample(words, 4))}?\n\nAssistant: "
        answers = [f"{first} {' '.join(draw.sample(words, 3))}" for first in ("yes", "no")]
        return json.dumps({"chosen": question + answers[0], "rejected": question + answers[1]})

    folder.mkdir(parents=True)
    for name, count in (("train", 400), ("test", 40)):
        (folder / f"{name}.jsonl").write_text("".join(f"{row()}\n" for _ in range(count)))
