"""A client of the shared stack, with a model that has taken a step."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.tinker.support import MODEL, STEP, plain, service_of
from tests.support.stack import RunningStack

# The SDK's connections live in a thread of its own, and are left open when their client is forgotten.
LEFT_OPEN = (
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For every test of this folder."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(*LEFT_OPEN))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Collected here, where no finalizer runs while Python compiles, which 3.11 does not survive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure() -> None:
    """The last of them are collected after the tests."""
    warnings.simplefilter("ignore")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture(scope="module")
def service(stack: RunningStack) -> Iterator[Any]:
    """A session that is finished at the end."""
    made = service_of(stack, user_metadata={"purpose": "contract"})
    yield made
    made.close("success").result()


@pytest.fixture(scope="module")
def model(service: Any) -> Any:
    """A model that has taken a step."""
    made = service.create_lora_training_client(
        base_model=MODEL, rank=8, seed=0, user_metadata={"renderer_name": "role_colon"}
    ).result()
    made.forward_backward([plain()], "cross_entropy")
    made.optim_step(STEP).result()
    return made
