"""Supervised fine-tuning on a chat file: `python examples/sft.py --data chats.jsonl --steps 40`.

Each line of the file is {"messages": [{"role": …, "content": …}, …]}; the loss counts the assistant's turns.
The last conversations of the file are held out, and their loss tells what was learnt.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rewardsignal import SignalClient, SignalRun
from rewardsignal.data import Batches, read_chat


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the loss of the held-out conversations before and after."""
    args = parse(argv)
    rows = list(read_chat(args.data))
    rows, held_out = rows[: -args.held_out], rows[-args.held_out :]
    batches = Batches(rows, batch_size=args.batch_size, shuffle=True, epochs=None)
    with (
        SignalClient() as client,
        client.create_run(args.model, name="sft", lora_r=16, learning_rate=args.lr, seed=1) as run,
    ):
        before = loss_of(run, held_out)
        in_flight: deque[Any] = deque()
        for step, batch in enumerate(islice(batches, args.steps), 1):
            # Submit a step, then wait for the one before it: the worker never idles.
            in_flight.append((step, run.forward_backward_async(batch)))
            run.optim_step_async(grad_clip_norm=1.0)
            if len(in_flight) > 1:
                show(*in_flight.popleft())
        show(*in_flight.popleft())
        after = loss_of(run, held_out)
        print(f"{run.run_id}: held-out loss {before:.3f} -> {after:.3f} nats per token")
    return {"run_id": run.run_id, "before": before, "after": after}


def show(step: int, future: Any) -> None:
    """One line when a step has ended."""
    print(f"step {step:3}  loss {future.result().loss:.3f}")


def loss_of(run: SignalRun, rows: Sequence[dict[str, Any]]) -> float:
    """Mean negative log-likelihood of the assistant's tokens, in nats; nothing is trained."""
    scored = run.forward(rows).rows
    logprobs: list[float] = [one for row in scored for one in row.logprobs if one is not None]
    return -sum(logprobs) / len(logprobs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("pirate.jsonl"))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=8, help="conversations to measure with")
    args = parser.parse_args(argv)
    if min(args.steps, args.held_out) < 1:
        parser.error("--steps and --held-out must be at least 1")
    return args


if __name__ == "__main__":
    main()
