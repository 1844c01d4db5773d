"""What the policy-gradient losses share: ratios to the sampler, the clipped surrogate, their metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.losses import Options
from workers.engine.losses.form import LossInput, Mean, Metrics, mean
from workers.engine.losses.pairs import share


def log_ratio(data: LossInput) -> Tensor:
    """log p(token) - log q(token) [N], q the sampler's. Without its log-probabilities, q is p itself."""
    sampled = data.arrays.get("logprobs")
    return data.logprobs - (data.logprobs.detach() if sampled is None else sampled)


def where_advantage(log_ratios: Tensor, advantages: Tensor) -> Tensor:
    """The log-ratios, 0 and without gradient where the advantage is 0.

    There the product is 0 whatever the ratio, but 0 * infinity, in the value or in the gradient, is not.
    """
    return torch.where(advantages == 0, log_ratios.new_zeros(()), log_ratios)


def bounds(options: Options) -> tuple[float, float]:
    """[1 - epsilon, 1 + epsilon_high], what a ratio is clipped to."""
    low, high = options["epsilon"], options["epsilon_high"]
    return 1 - low, 1 + (low if high is None else high)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, most: float | None = None
) -> Tensor:
    """min(r * A, clip(r, low, high) * A) [N], the first r at most `most` where that is given."""
    unclipped = ratio if most is None else ratio.clamp(max=most)
    return torch.minimum(unclipped * advantages, ratio.clamp(low, high) * advantages)


def k3(log_ratios: Tensor) -> Tensor:
    """e^x - 1 - x [N] of x = log p/q: from samples of q, an unbiased estimate of KL(q || p) that is never
    negative. Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html."""
    return torch.expm1(log_ratios) - log_ratios


def ratio_metrics(log_ratios: Tensor) -> Metrics:
    """The mean ratio, and how far the policy is from the sampler, in nats: as a divergence, and per token.

    On tokens that were sampled from the weights of now, the latter is what the sampler's arithmetic and the
    trainer's differ by.
    """
    log_ratios = log_ratios.detach()
    return {
        "ratio": mean(log_ratios.exp()),
        "approx_kl": mean(k3(log_ratios)),
        "logprob_gap": mean(log_ratios.abs()),
    }


def clip_metrics(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Metrics:
    """Shares of tokens whose ratio is clipped on the side that the advantage drives it to."""
    ratio = ratio.detach()
    below = (ratio < low) & (advantages < 0)
    above = (ratio > high) & (advantages > 0)
    return {
        "clip_ratio/low_mean": share(below),
        "clip_ratio/high_mean": share(above),
        "clip_ratio/region_mean": share(below | above),
    }


def reward_metrics(data: LossInput) -> Metrics:
    """Of rows that came with rewards: their mean, and the share of those in groups of equal rewards."""
    names = {"reward": "reward", "zero_std": "frac_reward_zero_std"}
    found: dict[str, Mean] = {}
    for name, metric in names.items():
        if name in data.row_values:
            found[metric] = mean(data.row_values[name])
    return found
