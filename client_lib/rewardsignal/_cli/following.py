"""`signal runs watch` and `signal runs logs`: what happens and what has finished, as it does."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from rewardsignal._cli.options import client, json_option, run_argument
from rewardsignal._cli.output import emit_line, local_time, printable, seconds_between
from rewardsignal._client import SignalClient
from rewardsignal._exceptions import SignalAPIError
from rewardsignal._run import SignalRun
from rewardsignal._schemas import Operation, RunEvent

# How long a look for new operations is held; events are seen at its end.
HELD_S = 1.0
PAGE = 500
# The numbers of an operation that a line has room for.
SHOWN = ("loss", "reward", "grad_norm", "learning_rate")


@click.command()
@run_argument
@click.option("--after", default=0, show_default=True, help="Only events with a greater id.")
@json_option
def watch(run_id: str, after: int, as_json: bool) -> None:
    """What happens to a run, until it ends: placed, worker lost, rebuilt, paused, …"""
    with client() as server:
        for event in server.run(run_id).watch(after):
            emit_line(event.to_dict()) if as_json else _say(told_event(event))


@click.command()
@run_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
@click.option("--after-seq", default=0, show_default=True, help="Only operations after this one.")
@json_option
def logs(run_id: str, follow: bool, after_seq: int, as_json: bool) -> None:
    """A run's finished operations with their numbers and durations, and its events between them.

    With --json one object a line: {"operation": …} with its metrics, or {"event": …}.
    """
    with client() as server:
        for line in _Log(server, server.run(run_id), after_seq).lines(follow):
            emit_line(line.raw) if as_json else _say(line.text)


@dataclass(frozen=True, order=True)
class Line:
    """One thing that happened: when, as JSON, and in words."""

    at: str
    raw: Mapping[str, Any] = field(compare=False)
    text: str = field(compare=False)


class _Log:
    """Reads a run's operations and events in pages, and merges them by their times."""

    def __init__(self, server: SignalClient, run: SignalRun, after_seq: int) -> None:
        self._server, self._run = server, run
        self._seq, self._event = after_seq, 0
        self._ended = False

    def lines(self, follow: bool) -> Iterator[Line]:
        """What there is, then with `follow` what comes until the run has ended."""
        later = self._seq > 0
        numbers = {row.seq: row.metrics for row in self._run.metrics().metrics if row.seq}
        done = list(self._operations(0.0, numbers))
        # Who asks for the later operations wants no events from before them.
        events = [one for one in self._events() if not later or (done and one.at >= done[0].at)]
        yield from heapq.merge(done, events)
        while follow and not self._ended:
            new = list(self._operations(HELD_S, {}))
            yield from heapq.merge(new, list(self._events()))
        if follow:
            yield from self._operations(0.0, {})

    def _operations(
        self, held: float, numbers: Mapping[int, Mapping[str, float]]
    ) -> Iterator[Line]:
        """Finished operations; those that are newer than the numbers have them in their results."""
        newest = max(numbers, default=0)
        while True:
            page = self._run.operations(self._seq, wait=held, limit=PAGE)
            for one in page.data:
                self._seq = one.seq
                new = one.seq > newest
                yield _operation_line(one, self._result(one) if new else numbers.get(one.seq, {}))
            if not page.has_more:
                return

    def _events(self) -> Iterator[Line]:
        while True:
            page = self._run.events(self._event, limit=PAGE)
            self._event, self._ended = page.next_after, page.ended
            for one in page.data:
                yield Line(one.at, {"event": one.to_dict()}, told_event(one))
            if not page.has_more:
                return

    def _result(self, one: Operation) -> Mapping[str, float]:
        """The numbers of an operation that has just ended: its result has them at once."""
        if one.status != "completed":
            return {}
        try:
            result = self._server.future(one.future_id).result()
        except SignalAPIError:
            # Its time is over, which is no reason to end the log.
            return {}
        plain = {n: v for n, v in result.items() if type(v) is float and n != "loss_sum"}
        return {**plain, **result.get("metrics", {})}


def _operation_line(one: Operation, numbers: Mapping[str, float]) -> Line:
    at = one.finished_at or one.submitted_at
    raw = {"operation": {**one.to_dict(), "metrics": dict(numbers)}}
    return Line(at, raw, _told(at, f"{one.seq:>6}", one.kind, _words_of(one, numbers)))


def _words_of(one: Operation, numbers: Mapping[str, float]) -> str:
    words = [f"{name} {numbers[name]:.4g}" for name in SHOWN if name in numbers]
    if one.tokens:
        words.append(f"{one.tokens:,} tokens")
    took = seconds_between(one.started_at, one.finished_at)
    if took is not None:
        words.append(f"{took:.2f} s")
    if one.error:
        words.append(f"{one.status}: {one.error.message} [{one.error.code}]")
    return ", ".join(words)


def told_event(event: RunEvent) -> str:
    """An event as one line: when, what, and its plain facts."""
    plain = {
        name: value for name, value in event.data.items() if not isinstance(value, dict | list)
    }
    facts = ", ".join(f"{name} {value}" for name, value in plain.items() if value is not None)
    return _told(event.at, " " * 6, event.type.replace("_", " "), facts)


def _told(at: str, seq: str, what: str, facts: str) -> str:
    return f"{local_time(at)} {seq}  {what:<18}{facts}".rstrip()


def _say(line: str) -> None:
    click.echo(printable(line))
