"""A loss of your own: `python examples/custom_loss.py` trains on focal loss, which no server option offers.

The server computes log-probabilities, the client any differentiable loss of them with its gradient, and the
server trains on that: two passes. Focal loss is −(1 − p)^γ·log p for each token of probability p: what the
model knows already hardly counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rewardsignal import SignalClient
from rewardsignal.data import Batches, read_chat


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the focal loss of held-out conversations before and after."""
    args = parse(argv)
    chats = list(read_chat(args.data))
    chats, held_out = chats[: -args.held_out], chats[-args.held_out :]
    batches = Batches(chats, batch_size=args.batch_size, shuffle=True, epochs=None)

    def focal(rows: Sequence[Any]) -> tuple[float, list[list[float]]]:
        return focal_loss([row.logprobs for row in rows], args.gamma)

    with (
        SignalClient() as client,
        client.create_run(
            args.model, name="focal", lora_r=16, learning_rate=args.lr, seed=1
        ) as run,
    ):
        before, _ = focal(run.forward(held_out).rows)
        for step, batch in enumerate(islice(batches, args.steps), 1):
            result = run.forward_backward_custom(batch, focal)
            run.optim_step_async(grad_clip_norm=1.0)
            print(f"step {step:3}  focal loss {result.loss:.3f}")
        after, _ = focal(run.forward(held_out).rows)
        print(f"{run.run_id}: held-out focal loss {before:.3f} -> {after:.3f}")
    return {"run_id": run.run_id, "before": before, "after": after}


def focal_loss(
    rows: Sequence[Sequence[float | None]], gamma: float
) -> tuple[float, list[list[float]]]:
    """The mean over all tokens, and its gradient by each log-probability (None does not count)."""
    count = sum(number is not None for row in rows for number in row)
    loss = sum(
        focal_token(number, gamma)[0] for row in rows for number in row if number is not None
    )
    slopes = [
        [0.0 if number is None else focal_token(number, gamma)[1] / count for number in row]
        for row in rows
    ]
    return loss / count, slopes


def focal_token(logprob: float, gamma: float) -> tuple[float, float]:
    """−(1 − p)^γ·log p and its derivative by log p; dp/d(log p) is p."""
    p = math.exp(logprob)
    rest = max(1.0 - p, 1e-6)
    return -(rest**gamma) * logprob, gamma * rest ** (gamma - 1) * p * logprob - rest**gamma


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("pirate.jsonl"))
    parser.add_argument("--gamma", type=float, default=2.0, help="γ; 0 is the usual loss")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=8, help="conversations to measure with")
    args = parser.parse_args(argv)
    if min(args.steps, args.held_out) < 1:
        parser.error("--steps and --held-out must be at least 1")
    return args


if __name__ == "__main__":
    main()
