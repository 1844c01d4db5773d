"""On-policy distillation: `python examples/distill.py` teaches a model what a system prompt made it say.

The student samples; the teacher scores those very tokens; each token's advantage is the teacher's
log-probability less the student's, so that training descends the reverse KL divergence. The teacher is the
base model with a system prompt, or with `--teacher RUN/ARTIFACT` a state that another run saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rewardsignal import SignalClient
from rewardsignal.data import Batches

SYSTEM = "You are a pirate. Answer in one short sentence and begin with Arr!"
TOPICS = ["the sea", "a dog", "winter", "music", "a train", "bread", "the moon", "a garden"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the reverse KL divergence per token of the first and of the last steps."""
    args = parse(argv)
    weights: Any = "base"
    if args.teacher:
        run_id, artifact = args.teacher.split("/")
        weights = {"run_id": run_id, "artifact": artifact}
    system = [] if args.teacher else [{"role": "system", "content": args.system}]
    questions = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
    batches = Batches(questions, batch_size=args.prompts, shuffle=True, epochs=None)
    with (
        SignalClient() as client,
        client.create_run(
            args.model, name="distill", lora_r=16, learning_rate=args.lr, seed=1
        ) as run,
    ):
        divergences = []
        for step, batch in enumerate(islice(batches, args.steps), 1):
            # The loss compares with the sampler's log-probabilities: they must be of one distribution.
            sampled = run.sample(
                batch,
                n=args.samples,
                max_tokens=args.max_tokens,
                temperature=1.0,
                top_p=1.0,
                logprobs=True,
            )
            pairs = [
                (number, one) for number, samples in enumerate(sampled.samples) for one in samples
            ]
            asked = [
                run.apply_chat_template([*system, *row], add_generation_prompt=True).token_ids
                for row in batch
            ]
            # max_tokens 0: the teacher reads its own prompt and the student's answer, and writes nothing.
            scored = run.sample(
                [asked[number] + one.token_ids for number, one in pairs],
                weights=weights,
                max_tokens=0,
                prompt_logprobs=True,
            )
            rows, gaps = [], []
            for (number, one), logprobs in zip(pairs, scored.prompt_logprobs or [], strict=True):
                teacher = logprobs[len(asked[number]) :]
                gap = [own - other for own, other in zip(one.logprobs or [], teacher, strict=True)]
                rows.append(row_of(sampled.prompt_token_ids[number], one, gap))
                gaps += gap
            run.forward_backward_async(rows, "importance_sampling")
            run.optim_step_async(grad_clip_norm=1.0)
            divergences.append(mean(gaps))
            print(f"step {step:3}  KL {divergences[-1]:.3f}  {pairs[0][1].text[:60]!r}")
        before, after = mean(divergences[: args.window]), mean(divergences[-args.window :])
        print(f"{run.run_id}: KL(student, teacher) {before:.3f} -> {after:.3f} nats per token")
    return {"run_id": run.run_id, "before": before, "after": after}


def row_of(prompt: Sequence[int], sample: Any, gap: Sequence[float]) -> dict[str, Any]:
    """Tokens and their targets; over the prompt all is 0, which counts nothing there."""
    ids, before = [*prompt, *sample.token_ids], [0.0] * (len(prompt) - 1)
    return {
        "tokens": ids[:-1],
        "targets": ids[1:],
        "logprobs": [*before, *sample.logprobs],
        "advantages": [*before, *(-one for one in gap)],
    }


def mean(numbers: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--teacher", help="RUN/ARTIFACT of a state saved with save_state")
    parser.add_argument("--system", default=SYSTEM, help="what the base is told as the teacher")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--samples", type=int, default=4, help="samples per prompt")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--window", type=int, default=3, help="steps that before and after are of")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


if __name__ == "__main__":
    main()
