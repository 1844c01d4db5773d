"""PPO with generalized advantage estimation: `python examples/ppo.py` learns to write without the letter e.

The reward, checked by counting, comes with the last token. A critic tells each token's part of it: what it
expects before a token, less what it expected before. Here the critic is the client's own, a linear function
of how the text stands so far; the loss `ppo` takes its values and estimates the advantages (gamma, lam).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import Any

from rewardsignal import SignalClient
from rewardsignal.data import Batches

TOPICS = ["the sea", "a dog", "winter", "music", "a train", "bread", "the moon", "a garden"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; the mean reward and the critic's error, each of the first and of the last steps."""
    args = parse(argv)
    questions = [
        [{"role": "user", "content": f"Write one sentence about {topic}."}] for topic in TOPICS
    ]
    batches = Batches(questions, batch_size=args.prompts, shuffle=True, epochs=None)
    critic = Critic()
    rewards, errors = [], []
    with (
        SignalClient() as client,
        client.create_run(args.model, name="ppo", lora_r=16, learning_rate=args.lr, seed=1) as run,
    ):
        for step, batch in enumerate(islice(batches, args.steps), 1):
            prompts = [prompt for prompt in batch for _ in range(args.samples)]
            # The loss compares with the sampler's log-probabilities: they must be of one distribution.
            sampled = run.sample(
                prompts, max_tokens=args.max_tokens, temperature=1.0, top_p=1.0, logprobs=True
            )
            rows: list[dict[str, Any]] = []
            for prompt, (sample,), tokens in zip(
                prompts, sampled.samples, sampled.tokens or [], strict=True
            ):
                states = features(tokens, args.max_tokens)
                rows.append(
                    {
                        "prompt": prompt,
                        "response": sample.token_ids,
                        "logprobs": sample.logprobs,
                        "reward": reward(sample.text),
                        "values": [critic.value(state) for state in states],
                    }
                )
                errors.append(critic.learn(states, reward(sample.text)))
            for _ in range(args.epochs):  # the later ones are what the clipped ratio is for
                run.forward_backward_async(rows, "ppo", gamma=1.0, lam=args.lam, epsilon=0.2)
                run.optim_step_async(grad_clip_norm=1.0)
            rewards.append(mean([row["reward"] for row in rows]))
            print(f"step {step:3}  reward {rewards[-1]:.3f}  {sampled.samples[0][0].text[:60]!r}")
        before, after = mean(rewards[: args.window]), mean(rewards[-args.window :])
        print(f"{run.run_id}: mean reward of {args.window} steps {before:.3f} -> {after:.3f}")
    few = args.window * len(rows)
    return {
        "run_id": run.run_id,
        "before": before,
        "after": after,
        "critic": (mean(errors[:few]), mean(errors[-few:])),
    }


def reward(text: str) -> float:
    """The share of words that have no e; 0 without a word."""
    words = [word for word in text.lower().split() if any(map(str.isalpha, word))]
    return sum("e" not in word for word in words) / len(words) if words else 0.0


def features(texts: Sequence[str], max_tokens: int) -> list[list[float]]:
    """What the critic sees before each token: a constant, how far the text is, its reward so far."""
    return [
        [1.0, place / max_tokens, reward("".join(texts[:place])) * place / max_tokens]
        for place in range(len(texts))
    ]


class Critic:
    """A linear function of the features, fitted to rewards by gradient descent."""

    def __init__(self) -> None:
        """Expects nothing yet."""
        self.weights = [0.0, 0.0, 0.0]

    def value(self, state: Sequence[float]) -> float:
        """The reward that it expects."""
        return sum(w * x for w, x in zip(self.weights, state, strict=True))

    def learn(self, states: Sequence[Sequence[float]], reward: float, rate: float = 0.02) -> float:
        """One step for each state, whose return is the reward (gamma 1); the mean squared error before."""
        squares = []
        for state in states:
            error = reward - self.value(state)
            squares.append(error**2)
            self.weights = [w + rate * error * x for w, x in zip(self.weights, state, strict=True)]
        return mean(squares)


def mean(numbers: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(numbers) / len(numbers)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name of `signal models`"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--samples", type=int, default=6, help="samples per prompt")
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument(
        "--epochs", type=int, default=2, help="optimizer steps per batch of samples"
    )
    parser.add_argument("--lam", type=float, default=0.95, help="λ of the advantages")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--window", type=int, default=3, help="steps that before and after are of")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


if __name__ == "__main__":
    main()
