"""Direct preference optimization: `python examples/dpo.py --data preferences.jsonl`.

Each line of the file is {"prompt": …, "chosen": …, "rejected": …}. The reference is the model without its
adapter. A new adapter changes nothing, so the first log-probabilities are the reference's, and what the
held-out pairs gained over them is their implicit reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rewardsignal import SignalClient, SignalRun
from rewardsignal.data import Batches, read_preferences


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the margin and the accuracy of the held-out pairs at the end, both 0 at the beginning."""
    args = parse(argv)
    # As conversations, so that the model's chat template stands around them.
    pairs = [{**row, "prompt": as_chat(row["prompt"])} for row in read_preferences(args.data)]
    pairs, held_out = pairs[: -args.held_out], pairs[-args.held_out :]
    batches = Batches(pairs, batch_size=args.batch_size, shuffle=True, epochs=None)
    with (
        SignalClient() as client,
        client.create_run(args.model, name="dpo", lora_r=16, learning_rate=args.lr, seed=1) as run,
    ):
        reference = logprobs_of(run, held_out)
        for step, batch in enumerate(islice(batches, args.steps), 1):
            forward_backward = run.forward_backward_async(batch, "dpo", beta=args.beta)
            run.optim_step_async(grad_clip_norm=1.0)
            result = forward_backward.result()
            margin, right = (result.metrics[f"rewards/{of}"] for of in ("margins", "accuracies"))
            print(
                f"step {step:3}  loss {result.loss:.3f}  margin {margin:+.3f}  right {right:4.0%}"
            )
        gained = [
            args.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
            for (chosen, rejected), (ref_chosen, ref_rejected) in zip(
                logprobs_of(run, held_out), reference, strict=True
            )
        ]
        margin = sum(gained) / len(gained)
        accuracy = sum(one > 0 for one in gained) / len(gained)
        print(f"{run.run_id}: held-out pairs, margin 0 -> {margin:.3f}, {accuracy:.0%} preferred")
    return {"run_id": run.run_id, "margin": margin, "accuracy": accuracy}


def logprobs_of(run: SignalRun, pairs: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Log-probability of each pair's chosen and rejected response, summed over its tokens, in nats."""
    rows = run.forward(pairs).rows  # two of each pair, the chosen one first
    sums = [sum(number for number in row.logprobs if number is not None) for row in rows]
    return list(zip(sums[::2], sums[1::2], strict=True))


def as_chat(prompt: Any) -> Any:
    """A text as the user's turn; messages and token ids as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).with_name("preferences.jsonl"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--held-out", type=int, default=6, help="pairs to measure with")
    args = parser.parse_args(argv)
    if min(args.steps, args.held_out) < 1:
        parser.error("--steps and --held-out must be at least 1")
    return args


if __name__ == "__main__":
    main()
