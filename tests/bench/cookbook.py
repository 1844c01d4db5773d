"""Four recipes of tinker-cookbook in their long form: `python -m tests.bench.cookbook`, JSON on stdout.

Each must learn: what its loss or reward was and what it came to is printed, and the exit status is 1 where it
did not move as it should.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.timing import say
from tests.support.cookbook import Place, chat_sl, dpo, guess_number, math_rl, prepared

PRIMING_STEPS = 150


def math_rl_smollm2(place: Place) -> dict[str, Any]:
    """Sums on a real model, for its speed."""
    return math_rl(
        place, steps=8, model_name="smollm2/model", groups_per_batch=8, max_tokens=9, learning_rate=3e-4,
        lora_rank=8,
    )  # fmt: skip


RUNS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "chat_sl": chat_sl,
    "dpo": dpo,
    "math_rl": math_rl,
    "guess_number": guess_number,
    "math_rl_smollm2": math_rl_smollm2,
}


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
    models = {"smollm2": chosen.smollm2} if "math_rl_smollm2" in names else {}
    steps = PRIMING_STEPS if {"math_rl", "guess_number"} & {*names} else 0
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="signal-cookbook-") as root,
        prepared(Path(root), priming_steps=steps, **models) as here,
    ):
        for name in names:
            say(f"  {name}")
            begun = time.monotonic()
            found[name] = RUNS[name](here)
            found[name]["took_s"] = round(time.monotonic() - begun, 1)
    json.dump(found, sys.stdout, indent=2)
    print()
    sys.exit(0 if all(one["learns"] for one in found.values()) else 1)


if __name__ == "__main__":
    main()
