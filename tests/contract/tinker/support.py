"""What the tests with the real SDK share: clients, data, and what an error must look like."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import tinker
from tinker import types

from tests.support.stack import RunningStack

T = TypeVar("T")
MODEL = "tiny"
IDS = list(range(5, 18))
STEP = types.AdamParams(learning_rate=1e-2)


def key_of(api_key: str) -> str:
    """As the SDK wants it."""
    return f"tml-{api_key}"


def service_of(stack: RunningStack, api_key: str | None = None, **fields: Any) -> Any:
    """A client of the stack."""
    key = key_of(api_key or stack.api_key)
    return tinker.ServiceClient(base_url=stack.base_url, api_key=key, **fields)


def rest_of(stack: RunningStack, api_key: str | None = None) -> Any:
    """A client without a session."""
    return tinker.RestClient(base_url=stack.base_url, api_key=key_of(api_key or stack.api_key))


def tensor(values: list[Any], dtype: str = "float32", shape: list[int] | None = None) -> Any:
    return types.TensorData(data=values, dtype=dtype, shape=shape or [len(values)])


def datum(ids: list[int] | None = None, **inputs: Any) -> types.Datum:
    """Tokens that predict the next ones; `inputs` replace or join the loss's."""
    ids = IDS if ids is None else ids
    given = {"target_tokens": tensor(ids[1:], "int64"), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={name: value for name, value in given.items() if value is not None},
    )


def plain(ids: list[int] | None = None) -> types.Datum:
    """For cross_entropy."""
    ids = IDS if ids is None else ids
    return datum(ids, weights=tensor([1.0] * (len(ids) - 1)))


def policy(logprob: float = -1.0, advantage: float = 1.0) -> types.Datum:
    """For losses that are corrected for a sampler."""
    count = len(IDS) - 1
    return datum(logprobs=tensor([logprob] * count), advantages=tensor([advantage] * count))


PROMPT = types.ModelInput.from_ints(IDS)


def params(**fields: Any) -> types.SamplingParams:
    return types.SamplingParams(**{"max_tokens": 4, "stop": [], "seed": 1, **fields})


def wait(awaitable: Awaitable[T]) -> T:
    """The result of one of the SDK's older asynchronous methods."""

    async def waited() -> T:
        return await awaitable

    return asyncio.run(waited())
