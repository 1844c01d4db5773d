"""Advantages: against numpy and against the definitions, written otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.text.rewards import discounted, generalized_advantages, group_advantages

GROUPS = [[1.0, 0.0, 0.5], [3.0, -1.0], [0.1] * 10]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_equal_numpy(scale: str) -> None:
    whole = np.concatenate([np.array(group) for group in GROUPS])
    for group, found in zip(GROUPS, group_advantages(GROUPS, scale), strict=True):
        divisor = {
            "group": np.std(group, ddof=1) + 1e-4,
            "batch": np.std(whole, ddof=1) + 1e-4,
            "none": 1.0,
        }[scale]
        expected = (np.array(group) - np.mean(group)) / divisor
        assert found == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_nothing(scale: str) -> None:
    assert group_advantages(GROUPS, scale)[2] == [0.0] * 10


numbers = st.floats(-10, 10)
shares = st.floats(0, 1)


@given(reward=numbers, values=st.lists(numbers, min_size=1, max_size=8), gamma=shares, lam=shares)
def test_gae_equals_its_sum(reward: float, values: list[float], gamma: float, lam: float) -> None:
    """Eq. 16 as it is written, A[t] = sum over l of (gamma lam)^l d[t + l], not by recursion."""
    count = len(values)
    rewards = [0.0] * (count - 1) + [reward]
    following = [*values[1:], 0.0]
    deltas = [
        r + gamma * later - value
        for r, later, value in zip(rewards, following, values, strict=True)
    ]
    expected = [
        sum((gamma * lam) ** (place - start) * deltas[place] for place in range(start, count))
        for start in range(count)
    ]
    found = generalized_advantages(reward, values, gamma, lam)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_reward_without_values_is_discounted() -> None:
    assert discounted(2.0, 3, 0.5) == [0.5, 1.0, 2.0]
    assert discounted(2.0, 2, 1.0) == [2.0, 2.0]
    # With lambda 1 and values of 0 it is the same.
    assert generalized_advantages(2.0, [0.0] * 3, 0.5, 1.0) == discounted(2.0, 3, 0.5)
