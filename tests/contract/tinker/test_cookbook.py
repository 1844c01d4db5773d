"""Four recipes of tinker-cookbook, unmodified and offline: each learns. Their long form: `make cookbook`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from deploy import cookbook_env
from tests.support.cookbook import Place, chat_sl, dpo, guess_number, math_rl, prepared

RECIPES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "chat_sl": partial(chat_sl, first=3, last=7, by=0.5),
    "dpo": partial(dpo, steps=4),
    "math_rl": partial(math_rl, steps=6, groups_per_batch=8),
    "guess_number": partial(guess_number, steps=5),
}
# For the environment and the model that the first of them waits for.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A stack with the models, and the environment with the cookbook."""
    assert cookbook_env.main() == 0
    with prepared(tmp_path_factory.mktemp("cookbook"), priming_steps=80) as place:
        yield place


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns(here: Place, recipe: str) -> None:
    found = RECIPES[recipe](here)
    assert found["learns"], found
