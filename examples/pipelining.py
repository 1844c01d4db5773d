"""Pipelining in an event loop: `python examples/pipelining.py` does the same training with and without.

Every `…_async` call is awaited twice. The first await gives the operation its place in the run's order, the
second one its result; between the two the next operations are on their way, so the worker never waits for
the network. Both runs end in the same bits.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rewardsignal import AsyncSignalClient, AsyncSignalRun
from rewardsignal.data import Batches, read_chat

DEPTH = 4  # steps under way: enough to hide the network, few enough to stop soon after an error


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train twice; for each way the losses, the steps per second and the certificate's hash."""
    return asyncio.run(compare(parse(argv)))


async def compare(args: argparse.Namespace) -> dict[str, Any]:
    """One run after the other, so that they have the worker for themselves."""
    chats = read_chat(args.data)
    found = {}
    async with AsyncSignalClient() as client:
        for way in (one_by_one, pipelined):
            batches = islice(
                Batches(chats, batch_size=args.batch_size, shuffle=True, epochs=None), args.steps
            )
            run = await client.create_run(
                args.model, name=way.__name__, lora_r=16, learning_rate=args.lr, seed=1
            )
            async with run:
                await run.sample(
                    ["Hello"], max_tokens=1
                )  # so that loading the model is not measured
                begun = time.monotonic()
                losses = await way(run, batches)
                speed = len(losses) / (time.monotonic() - begun)
                sha256 = (await run.certificate()).sha256
            print(
                f"{way.__name__:10}  loss {losses[0]:.3f} -> {losses[-1]:.3f}  "
                f"{speed:.2f} steps/s  {sha256[:16]}"
            )
            found[way.__name__] = {"losses": losses, "speed": speed, "sha256": sha256}
    return found


async def one_by_one(run: AsyncSignalRun, batches: Any) -> list[float]:
    """Waits for each result before the next call: the worker idles while the network is busy."""
    losses = []
    for batch in batches:
        losses.append((await run.forward_backward(batch)).loss)
        await run.optim_step(grad_clip_norm=1.0)
    return losses


async def pipelined(run: AsyncSignalRun, batches: Any) -> list[float]:
    """Waits for places only, and for results a few steps behind."""
    losses: list[float] = []
    in_flight: deque[Any] = deque()
    for batch in batches:
        in_flight.append(await run.forward_backward_async(batch))
        await run.optim_step_async(grad_clip_norm=1.0)
        if len(in_flight) == DEPTH:
            losses.append((await in_flight.popleft()).loss)
    return losses + [(await future).loss for future in in_flight]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("pirate.jsonl"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


if __name__ == "__main__":
    main()
