"""GRPO with a reward that can be checked: `python examples/grpo.py --steps 20` learns small sums.

Every step samples a group of answers to each question, rewards them, and trains on how much better than its
group's mean each answer was. `--data` takes questions of your own: lines of {"prompt": …, "answer": …}.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rewardsignal import SignalClient
from rewardsignal.data import Batches, read_answers


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the mean reward of the first and of the last steps."""
    args = parse(argv)
    questions = list(read_answers(args.data)) if args.data else sums()
    batches = Batches(
        questions, batch_size=args.questions, shuffle=True, drop_last=True, epochs=None
    )
    with (
        SignalClient() as client,
        client.create_run(args.model, name="grpo", lora_r=16, learning_rate=args.lr, seed=1) as run,
    ):
        rewards = []
        for step, batch in enumerate(islice(batches, args.steps), 1):
            prompts = [row["prompt"] for row in batch]
            # The loss compares with the sampler's log-probabilities: they must be of one distribution.
            sampled = run.sample(
                prompts,
                n=args.group,
                max_tokens=args.max_tokens,
                temperature=1.0,
                top_p=1.0,
                logprobs=True,
            )
            groups = [
                {
                    "prompt": row["prompt"],
                    "responses": [
                        {
                            "tokens": sample.token_ids,
                            "logprobs": sample.logprobs,
                            "reward": reward(sample.text, row["answer"]),
                        }
                        for sample in samples
                    ],
                }
                for row, samples in zip(batch, sampled.samples, strict=True)
            ]
            # Not waited for: the next sample waits in the queue until the step is done.
            run.forward_backward_async(groups, "grpo")
            run.optim_step_async(grad_clip_norm=1.0)
            rewards.append(mean([one["reward"] for group in groups for one in group["responses"]]))
            run.log({"reward": rewards[-1]}, step=step)
            shown = f"{batch[0]['answer']} {sampled.samples[0][0].text!r}"
            print(f"step {step:3}  reward {rewards[-1]:.3f}  {shown}")
        before, after = mean(rewards[: args.window]), mean(rewards[-args.window :])
        print(f"{run.run_id}: mean reward of {args.window} steps {before:.3f} -> {after:.3f}")
    return {"run_id": run.run_id, "before": before, "after": after}


def reward(text: str, answer: Any) -> float:
    """1 for the right number, and up to 0.2 for the share of digits: a slope to climb before that."""
    numbers = re.findall(r"-?\d+", text)
    right = bool(numbers) and numbers[-1] == str(answer)
    return right + 0.2 * sum(c.isdigit() for c in text) / max(1, len(text))


def sums() -> list[dict[str, Any]]:
    """Every sum of two digits."""
    ask = "What is {} + {}? Answer with the number alone."
    return [
        {"prompt": [{"role": "user", "content": ask.format(a, b)}], "answer": a + b}
        for a in range(1, 10)
        for b in range(1, 10)
    ]


def mean(numbers: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--data", type=Path, help="JSONL of prompt and answer; by default sums")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--questions", type=int, default=8, help="questions per step")
    parser.add_argument("--group", type=int, default=8, help="answers per question")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--window", type=int, default=3, help="steps that before and after are of")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


if __name__ == "__main__":
    main()
