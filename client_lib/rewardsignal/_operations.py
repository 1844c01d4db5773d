"""The bodies of the primitives: arguments in, JSON objects out. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewardsignal._schemas import OptimStepOptions, SampleOptions

Batch = Iterable[Mapping[str, Any]]
# Texts, lists of messages, or lists of token ids; a text alone is a list of one.
Prompts = str | Sequence[str] | Sequence[Sequence[Mapping[str, Any]]] | Sequence[Sequence[int]]


def forward_backward(
    batch: Batch,
    loss_fn: str,
    accumulate: bool,
    loss_kwargs: Mapping[str, Any],
    logprobs: bool = False,
) -> dict[str, Any]:
    """The body of forward_backward."""
    body: dict[str, Any] = {"batch_data": list(batch), "loss_fn": loss_fn}
    if not accumulate:
        body["accumulate"] = False
    if logprobs:
        body["logprobs"] = True
    if loss_kwargs:
        body["loss_kwargs"] = dict(loss_kwargs)
    return body


def forward(batch: Batch, top_k: int, prompt_logprobs: bool) -> dict[str, Any]:
    """The body of forward."""
    return {"batch_data": list(batch), "top_k": top_k, "prompt_logprobs": prompt_logprobs}


def optim_step(learning_rate: float | None, options: OptimStepOptions) -> dict[str, Any]:
    """The body of optim_step."""
    return given({"learning_rate": learning_rate, **options})


def sample(prompts: Prompts, options: SampleOptions) -> dict[str, Any]:
    """The body of sample."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = given(options)
    if "return_logprobs" in asked:
        # What the first Signal's SDK called it.
        asked["logprobs"] = asked.pop("return_logprobs")
    return {"prompts": listed, **asked}


def save_state(name: str | None, mode: str) -> dict[str, Any]:
    """The body of save_state."""
    return given({"name": name, "mode": mode})


def load_state(artifact: str, run_id: str | None, optimizer: bool) -> dict[str, Any]:
    """The body of load_state."""
    return {"artifact": artifact, "optimizer": optimizer, **given({"run_id": run_id})}


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set: None stands for the server's default."""
    return {name: value for name, value in fields.items() if value is not None}
