"""The loop without the service: one process, the same engine. Prints JSON."""

from __future__ import annotations

import argparse
import json
import time
from array import array

from tests.bench.timing import percentiles


def main() -> None:
    """Times `steps` pairs of forward_backward and optim_step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()

    from workers.engine.adamw import AdamWSettings
    from workers.engine.base import load_base
    from workers.engine.lora import LoraSpec
    from workers.engine.trainer import Trainer
    from workers.text.rows import Row

    base = load_base(args.model, dtype="float32", device="cpu", threads=args.threads)
    trainer = Trainer(
        base, LoraSpec(r=args.rank, alpha=32.0, target_modules=None, seed=0), AdamWSettings()
    )
    tokens = array("i", range(4, 4 + args.length))
    targets = array("i", [*tokens[1:], 0])
    weights = array("f", [1.0] * (args.length - 1) + [0.0])
    rows = [Row(tokens, targets, weights)] * args.rows
    forward, optim = [], []
    for step in range(args.steps + 2):
        begun = time.perf_counter()
        trainer.forward_backward(rows, "causal_lm", {}, True)
        between = time.perf_counter()
        trainer.optim_step()
        if step >= 2:
            forward.append((between - begun) * 1e3)
            optim.append((time.perf_counter() - between) * 1e3)
    total = (sum(forward) + sum(optim)) / 1e3
    print(
        json.dumps(
            {
                "forward_backward_ms": percentiles(forward),
                "optim_step_ms": percentiles(optim),
                "steps_per_s": round(args.steps / total, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
