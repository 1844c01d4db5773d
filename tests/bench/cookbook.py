"""Four recipes of tinker-cookbook, unmodified and offline, against a stack: `python -m tests.bench.cookbook`.

They run in the environment `.cookbook` (`make cookbook` makes it). Each must learn: what its loss or reward
was and what it came to is printed as JSON, and the exit status is 1 where it did not move as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.cookbook_priming import primed
from tests.bench.timing import say
from tests.support import stack as stacks
from tests.support.stack import RunningStack
from tests.support.tiny import make_tiny_model

PYTHON = Path(".cookbook/bin/python").absolute()
RECIPES = "tinker_cookbook.recipes"


@dataclass(frozen=True)
class Place:
    """Where the recipes run: a stack, and a folder in which models and data are found by their names."""

    stack: RunningStack
    folder: Path

    def recipe(self, name: str, log: str, **options: Any) -> list[dict[str, Any]]:
        """Run a recipe to its end; its metrics, step by step. Raises RuntimeError when it fails."""
        say(f"  {name} {options}")
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


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    """A metric of all steps that have it."""
    return [row[name] for row in rows if name in row]


def moved(values: list[float], up: bool, by: float) -> dict[str, Any]:
    """Where it began and where it ended (means of a quarter), and whether that is as it should be."""
    part = max(1, len(values) // 4)
    first, last = sum(values[:part]) / part, sum(values[-part:]) / part
    learnt = last - first if up else first - last
    return {"from": round(first, 4), "to": round(last, 4), "n": len(values), "learns": learnt >= by}


def chat_sl(place: Place) -> dict[str, Any]:
    """Supervised, on the cookbook's own example file, killed off by its bound and resumed."""
    options = {
        "dataset": example_data(), "model_name": "tiny/model", "batch_size": 32, "num_epochs": 6,
        "max_length": 512, "save_every": 2, "learning_rate": 5e-3,
    }  # fmt: skip
    place.recipe("chat_sl.train", "sl", **options, max_steps=5)
    log = place.folder / "sl" / "checkpoints.jsonl"
    # As if it had been killed before its last save.
    kept = [line for line in log.read_text().splitlines() if '"final"' not in line]
    log.write_text("\n".join(kept) + "\n")
    options["behavior_if_log_dir_exists"] = "resume"
    rows = place.recipe("chat_sl.train", "sl", **options, max_steps=16)
    steps = column(rows, "step")
    assert steps.count(4) == 2, f"it did not resume at its checkpoint: {steps}"
    return moved(column(rows, "train_mean_nll"), up=False, by=1.0)


def dpo(place: Place) -> dict[str, Any]:
    """Preferences, with a reference that is sampled and a loss that the client computes."""
    rows = place.recipe(
        "preference.dpo.train", "dpo",
        model_name="tiny/model", dataset="hhh", batch_size=16, max_steps=12, learning_rate=3e-3,
    )  # fmt: skip
    return moved(column(rows, "dpo_loss"), up=False, by=0.3)


def math_rl(place: Place) -> dict[str, Any]:
    """Reinforcement learning on sums."""
    rows = place.recipe(
        "math_rl.train", "math",
        env="arithmetic", model_name="primed/model", groups_per_batch=16, group_size=8,
        max_tokens=14, max_steps=15, learning_rate=5e-3,
    )  # fmt: skip
    seconds = sorted(column(rows, "time/total"))[len(rows) // 2]
    found = moved(column(rows, "env/all/reward/total"), up=True, by=0.02)
    return {**found, "seconds_per_step": round(seconds, 2)}


def math_rl_smollm2(place: Place) -> dict[str, Any]:
    """The same on a real model, for its speed."""
    rows = place.recipe(
        "math_rl.train", "math-smollm2",
        env="arithmetic", model_name="smollm2/instruct", groups_per_batch=8, group_size=8,
        max_tokens=9, max_steps=6, learning_rate=3e-4, lora_rank=8,
    )  # fmt: skip
    found = moved(column(rows, "env/all/reward/total"), up=True, by=0.0)
    seconds = sorted(column(rows, "time/total"))[len(rows) // 2]
    return {**found, "steps_per_s": round(1 / seconds, 4)}


def guess_number(place: Place) -> dict[str, Any]:
    """Ten turns in which every answer that is no guess costs a point."""
    rows = place.recipe(
        "multiplayer_rl.guess_number.train", "guess",
        model_name="primed/model", batch_size=2, group_size=8, max_tokens=20, eval_every=0,
        save_every=0, max_steps=16, learning_rate=3e-3,
    )  # fmt: skip
    return moved(column(rows, "env/all/reward/total"), up=True, by=1.0)


RUNS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "chat_sl": chat_sl,
    "dpo": dpo,
    "math_rl": math_rl,
    "guess_number": guess_number,
    "math_rl_smollm2": math_rl_smollm2,
}


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


def places(names: list[str], smollm2: Path) -> Iterator[Place]:
    """One stack for all of them, and nothing left of it."""
    with tempfile.TemporaryDirectory(prefix="signal-cookbook-") as root:
        folder = Path(root) / "here"
        models = {"tiny/model": make_tiny_model(folder / "tiny" / "model")}
        preferences(folder / "Anthropic" / "hh-rlhf")
        if {"math_rl", "guess_number"} & {*names}:
            models["primed/model"] = primed(
                folder / "primed" / "model", models["tiny/model"], PYTHON
            )
        if "math_rl_smollm2" in names:
            models["smollm2/instruct"] = folder / "smollm2" / "instruct"
            (folder / "smollm2").mkdir()
            (folder / "smollm2" / "instruct").symlink_to(smollm2.absolute())
        options = [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
        # Its clients leave without a word: their places must be free for the next.
        environment = {"SIGNAL_CLIENT_GONE": "20"}
        stack = stacks.up(Path(root) / "data", "--devices", "cpu:2x1", *options, env=environment)
        try:
            yield Place(stack, folder)
        finally:
            stacks.down(stack.data_dir)


def main() -> None:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser()
    # What argparse compares when none is named is the empty list.
    parser.add_argument("recipes", nargs="*", choices=[*RUNS, []])
    parser.add_argument(
        "--smollm2", type=Path, default=Path(".signal/models/smollm2-135m-instruct")
    )
    chosen = parser.parse_args()
    names = chosen.recipes or list(RUNS)
    found: dict[str, Any] = {}
    for place in places(names, chosen.smollm2):
        for name in names:
            begun = time.monotonic()
            found[name] = RUNS[name](place)
            found[name]["took_s"] = round(time.monotonic() - begun, 1)
    json.dump(found, sys.stdout, indent=2)
    print()
    sys.exit(0 if all(one["learns"] for one in found.values()) else 1)


if __name__ == "__main__":
    main()
