"""Rewards to advantages: relative to a group, discounted, or by a critic's values. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, sqrt

# TRL's guard against a division by 0.
EPSILON = 1e-4


def group_advantages(groups: Sequence[Sequence[float]], scale: str) -> list[list[float]]:
    """(r - mean of its group) / (std + 1e-4), with std of the group, of the whole batch, or no divisor.

    `groups[g][i]` is a reward; `scale` is "group", "batch" or "none"; std is the sample's (n - 1).
    Source: Shao et al. 2024 (2402.03300) section 4.1.2; "batch" and "none" as TRL's `scale_rewards`.
    """
    of_batch = _std([reward for group in groups for reward in group])
    advantages = []
    for group in groups:
        mean = fsum(group) / len(group)
        divisor = {"group": _std(group), "batch": of_batch}.get(scale, 1.0 - EPSILON) + EPSILON
        # Equal rewards are exactly 0, whatever the rounding of their mean.
        equal = min(group) == max(group)
        advantages.append([0.0 if equal else (reward - mean) / divisor for reward in group])
    return advantages


def discounted(reward: float, length: int, gamma: float) -> list[float]:
    """gamma^(T-1-t) * reward for each token t of T: the return of a reward that comes with the last."""
    return [reward * gamma ** (length - 1 - place) for place in range(length)]


def generalized_advantages(
    reward: float, values: Sequence[float], gamma: float, lam: float
) -> list[float]:
    """A[t] = d[t] + gamma * lam * A[t+1], d[t] = r[t] + gamma * V[t+1] - V[t], for a reward at the end.

    `values[t]` is V before token t; V after the last is 0. The returns are A + V.
    Source: Schulman et al. 2015 (1506.02438) eq. 16.
    """
    advantages, following, later = [0.0] * len(values), 0.0, 0.0
    for place in reversed(range(len(values))):
        earned = reward if place == len(values) - 1 else 0.0
        later = earned + gamma * following - values[place] + gamma * lam * later
        advantages[place], following = later, values[place]
    return advantages


def _std(numbers: Sequence[float]) -> float:
    if len(numbers) < 2:
        return 0.0
    mean = fsum(numbers) / len(numbers)
    return sqrt(fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
