"""The loop of `signal train`: batches in, optimizer steps out, and how one goes on after a break.

What a training needs to go on is kept with its run, in three labels: its kind, its settings and a
digest of its data. Batches are a function of the data and the seed, so the number of steps that the run
has taken says which batch is next. A batch and its step are submitted by one request, two of them ahead,
so that the worker never waits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from rewardsignal._cli.progress import Display, Report, Speed
from rewardsignal._cli.rewards import Reward
from rewardsignal._futures import APIFuture
from rewardsignal._run import SignalRun
from rewardsignal._schemas import CLOSED_STATUSES, Run
from rewardsignal.data import Batches, Dataset

KIND, SETTINGS, DATA = "train", "train.settings", "train.data"
AHEAD = 2
HELD_S = 20.0

Batch = Sequence[Mapping[str, Any]]
# From a batch of the file to the rows of a forward_backward.
Rows = Callable[[Batch], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Settings:
    """What must be the same before and after a break, or the training would be another one."""

    steps: int
    batch_size: int
    seed: int
    grad_clip_norm: float
    beta: float | None = None
    group_size: int | None = None
    max_tokens: int | None = None
    reward: str | None = None

    def labels(self, kind: str, digest: str) -> dict[str, str]:
        """As the labels of a run."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {KIND: kind, SETTINGS: json.dumps(known, separators=(",", ":")), DATA: digest}


def stored(run: Run, kind: str, digest: str) -> Settings:
    """The settings of a training that is to go on. Raises UsageError where it cannot."""
    if run.status in CLOSED_STATUSES:
        raise click.UsageError(f"--resume: {run.run_id} has ended ({run.status}).")
    if run.labels.get(KIND) != kind:
        raise click.UsageError(f"--resume: {run.run_id} was not made by `signal train {kind}`.")
    if run.labels.get(DATA) != digest:
        raise click.UsageError(f"--resume: {run.run_id} was trained on a file of other contents.")
    return Settings(**json.loads(run.labels[SETTINGS]))


def digest_of(path: Path) -> str:
    """A name for a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def steps_of_one_pass(rows: int, batch_size: int) -> int:
    """How many steps it takes to see each row once."""
    return math.ceil(rows / batch_size)


def batches(data: Dataset[Any], settings: Settings, done: int) -> Iterator[Batch]:
    """The batches from step `done` on, without an end."""
    fresh = Batches(
        data, batch_size=settings.batch_size, shuffle=True, seed=settings.seed, epochs=None
    )
    epoch, batch = divmod(done, steps_of_one_pass(len(data), settings.batch_size))
    place = {"epoch": epoch, "position": batch * settings.batch_size}
    return Batches(
        data, batch_size=settings.batch_size, shuffle=True, seed=settings.seed, epochs=None,
        state={**fresh.state(), **place},
    )  # fmt: skip


def settle(run: SignalRun) -> int:
    """Let a run go on and finish what a break left in its queue; the steps that it has taken then."""
    run.resume()
    while run.status().queued:
        run.operations(run.info.applied_seq, wait=HELD_S)
    last = run.operations(max(0, run.info.applied_seq - 1)).data
    if last and last[-1].kind == "forward_backward" and last[-1].status == "completed":
        # A request too large for one went as two, and the break came between them.
        run.optim_step()
    return run.status().current_step


class Loop:
    """Trains a run for the steps that are left."""

    def __init__(self, run: SignalRun, loss_fn: str, rows: Rows, settings: Settings) -> None:
        """`rows` makes what the loss takes of a batch."""
        self._run, self._rows, self._settings = run, rows, settings
        self._speed = Speed()
        options = {} if settings.beta is None else {"beta": settings.beta}
        self._forward = {"kind": "forward_backward", "loss_fn": loss_fn, "loss_kwargs": options}
        self._step = {"kind": "optim_step", "grad_clip_norm": settings.grad_clip_norm}

    def train(self, data: Dataset[Any], done: int, shown: Display) -> None:
        """Take the steps after `done`, and show each when it is."""
        pending: deque[tuple[APIFuture[Any], APIFuture[Any]]] = deque()
        given = batches(data, self._settings, done)
        for step in range(done, self._settings.steps):
            pending.append(self._submit(next(given)))
            if len(pending) == AHEAD:
                shown.show(self._finished(step - AHEAD + 2, *pending.popleft()))
        for place, pair in enumerate(pending, self._settings.steps - len(pending) + 1):
            shown.show(self._finished(place, *pair))

    def _submit(self, batch: Batch) -> tuple[APIFuture[Any], APIFuture[Any]]:
        forward = {**self._forward, "batch_data": list(self._rows(batch))}
        loss, step = self._run.submit([forward, self._step])
        return loss, step

    def _finished(self, place: int, loss: APIFuture[Any], step: APIFuture[Any]) -> Report:
        forward, stepped = loss.result(), step.result()
        tokens = int(forward.metrics.get("input_tokens", forward.num_tokens))
        return Report(
            run_id=self._run.run_id,
            step=place,
            steps=self._settings.steps,
            loss=forward.loss,
            reward=forward.metrics.get("reward"),
            grad_norm=stepped.grad_norm,
            learning_rate=stepped.learning_rate,
            tokens=tokens,
            tokens_per_s=self._speed.after(tokens),
        )


def as_they_are(batch: Batch) -> Batch:
    """Rows that the loss takes as the file has them."""
    return batch


def sampled_groups(run: SignalRun, reward: Reward, settings: Settings) -> Rows:
    """Groups of samples with their rewards, for `grpo`.

    They are sampled from the weights as they are then, at temperature 1: the loss compares log-probabilities
    with the sampler's, which must be of the same distribution.
    """

    def rows(batch: Batch) -> list[dict[str, Any]]:
        result = run.sample(
            [row["prompt"] for row in batch],
            n=settings.group_size, max_tokens=settings.max_tokens, temperature=1.0, top_p=1.0,
            logprobs=True,
        )  # fmt: skip
        return [
            {
                "prompt": prompt,
                "responses": [
                    {
                        "tokens": sample.token_ids,
                        "logprobs": sample.logprobs,
                        "reward": reward(sample.text, row),
                    }
                    for sample in samples
                ],
            }
            for row, prompt, samples in zip(
                batch, result.prompt_token_ids, result.samples, strict=True
            )
        ]

    return rows


def other_steps(settings: Settings, steps: int | None) -> Settings:
    """The settings with another end, if one is given."""
    return settings if steps is None else replace(settings, steps=steps)
