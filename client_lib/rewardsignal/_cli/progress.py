"""How far a training is: a bar on a terminal, a line per step off one, a JSON object per step if asked."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

import click
from tqdm import tqdm

from rewardsignal._cli.output import emit_line


@dataclass(frozen=True)
class Report:
    """One step that is done. `step` counts from 1, `tokens` are those that the model read for it."""

    run_id: str
    step: int
    steps: int
    loss: float
    reward: float | None
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_s: float

    def words(self) -> str:
        """The numbers that a reader watches."""
        reward = "" if self.reward is None else f"reward {self.reward:.3f}, "
        # Of a loss that is 0 but for rounding, no minus.
        loss = round(self.loss, 4) + 0.0
        return f"{reward}loss {loss:.4f}, {self.tokens_per_s:,.0f} tokens/s"


class Display(Protocol):
    """Where reports go."""

    def show(self, report: Report) -> None:
        """Show one step."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Speed:
    """Tokens per second since the first step was done: that one waited for the model to be loaded."""

    def __init__(self) -> None:
        """The clock of the first step begins now."""
        self._since = time.monotonic()
        self._tokens = self._steps = 0

    def after(self, tokens: int) -> float:
        """The speed, now that a step of so many tokens is done."""
        now = time.monotonic()
        if self._steps == 1:
            self._tokens = 0
        self._tokens += tokens
        speed = self._tokens / max(now - self._since, 1e-9)
        if self._steps == 0:
            self._since = now
        self._steps += 1
        return speed


class Bar:
    """A bar with the time that is left, on standard error."""

    def __init__(self, steps: int, done: int) -> None:
        """`done` of the `steps` were taken before."""
        # Its thread, which redraws bars that stand still, is one that we need not.
        tqdm.monitor_interval = 0
        self._bar = tqdm(
            total=steps,
            initial=done,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc} {bar} {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]",
            desc="Train",
            postfix="waiting for the first step",
        )

    def show(self, report: Report) -> None:
        """Move on by a step."""
        self._bar.set_postfix_str(report.words(), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """The bar stays, and what comes begins on a line of its own."""
        self._bar.close()


class Lines:
    """A line of text per step."""

    def __init__(self, done: int) -> None:
        """`done` steps were taken before."""
        self._done, self._since = done, time.monotonic()

    def show(self, report: Report) -> None:
        """Print the step, with the time that is left."""
        took = time.monotonic() - self._since
        left = took / (report.step - self._done) * (report.steps - report.step)
        words = f"step {report.step}/{report.steps}: {report.words()}"
        click.echo(f"{words}, {timedelta(seconds=round(left))} left")
        sys.stdout.flush()

    def close(self) -> None:
        """Nothing is open."""


class Objects:
    """A JSON object per step."""

    def show(self, report: Report) -> None:
        """Print the step."""
        emit_line(asdict(report))

    def close(self) -> None:
        """Nothing is open."""


def display(steps: int, done: int, *, as_json: bool) -> Display:
    """What suits where the output goes."""
    if as_json:
        return Objects()
    return Bar(steps, done) if sys.stderr.isatty() else Lines(done)
