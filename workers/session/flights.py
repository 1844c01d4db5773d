"""One run's samples under way: those in its order, and those that have no place in it.

They begin and end between tokens of the worker's batch. Those in order are committed in order; the others as
they end. What is not committed when the worker dies is begun again by the next.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
from redis.exceptions import RedisError

from schemas.errors import SignalError
from workers.engine.generation import Request, Ticket
from workers.queue import tokens
from workers.queue.journal import Journal
from workers.queue.records import Outcome, Taken
from workers.session.answers import sample_result
from workers.session.sampling import Sampler
from workers.session.weights import Source, Sources, refused_source
from workers.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Samples of one run that are under way at most; the others wait in the journal.
MOST = 512
_LOOK_S = 0.05
_TELL_S = 0.03


@dataclass(eq=False)
class Flight:
    """A sample under way; `outcome` is there once it has ended."""

    taken: Taken
    body: dict[str, Any]
    source: Source | None = None
    ticket: Ticket | None = None
    outcome: Outcome | None = None
    stored: tuple[bytes, str] | None = None
    unsaid: list[dict[str, Any]] = field(default_factory=list)
    # Nobody can cancel it.
    of_past: bool = False


class Flights:
    """The samples of one run on a worker's `Sampler`."""

    def __init__(
        self,
        journal: Journal,
        run: tuple[str, int],
        sampler: Sampler,
        sources: Sources,
        tokenizer: Tokenizer,
        seed: int,
        completed: Callable[[Taken, dict[str, Any]], Outcome],
        failed: Callable[[Taken, Exception], Outcome],
    ) -> None:
        """`run` is its id and the epoch of its lease; `completed` and `failed` make outcomes."""
        self._journal, (self.run_id, self._epoch), self._sampler = journal, run, sampler
        self._sources, self._tokenizer, self._seed = sources, tokenizer, seed
        self._completed, self._failed = completed, failed
        self.in_order: deque[Flight] = deque()
        self.free: dict[int, Flight] = {}
        self._by_ticket: dict[Ticket, Flight] = {}
        self._looked_at = self._told_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether any is under way or not committed yet."""
        return bool(self.in_order or self.free)

    @property
    def room(self) -> int:
        """How many more may begin."""
        if self._sampler.full:
            return 0
        return max(0, MOST - len(self.in_order) - len(self.free))

    def begin(self, taken: Taken) -> Flight:
        """Begin a sample; what is wrong with it is its outcome."""
        if not self._by_ticket:
            # Nobody can have cancelled yet what begins now.
            self._looked_at = time.monotonic()
        flight = Flight(taken, {})
        if taken.seq:
            self.in_order.append(flight)
        else:
            self.free[taken.number] = flight
        try:
            flight.body = msgpack.unpackb(taken.body)
            flight.source = self._find(flight.body)
            flight.ticket = self._sampler.submit(self, self._request(flight))
            self._by_ticket[flight.ticket] = flight
            self._announce(flight)
        except Exception as error:
            flight.outcome = self._failed(taken, error)
        return flight

    def alone(self, taken: Taken) -> Outcome:
        """Sample to the end an operation of the past; what it comes to is not committed."""
        flight = self.begin(taken)
        flight.of_past = True
        while flight.outcome is None:
            self._sampler.step()
        self.in_order.remove(flight)
        return flight.outcome

    def landed(self, ticket: Ticket) -> None:
        """See Owner.landed."""
        flight = self._by_ticket.pop(ticket)
        taken = flight.taken
        # Before its end can be seen.
        self._try(self._tell)
        try:
            if ticket.error is not None:
                raise ticket.error
            assert ticket.output is not None
            assert flight.source is not None
            result = sample_result(flight.body, flight.source, ticket.output, self._tokenizer)
            flight.outcome = self._completed(taken, result)
        except Exception as error:
            flight.outcome = self._failed(taken, error)

    def attend(self) -> None:
        """See Owner.attend. A Redis that is away stops nothing."""
        now = time.monotonic()
        if now - self._told_at >= _TELL_S:
            self._told_at = now
            self._try(self._tell)
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._try(self._look)

    def ended_free(self) -> list[Flight]:
        """Those without a place in the order that have ended and are not committed."""
        return [flight for flight in self.free.values() if flight.outcome is not None]

    def over(self, flight: Flight) -> None:
        """It is committed: who watches may read its result."""
        if flight.body.get("stream"):
            self._try(lambda: tokens.end(self._journal.redis, self.run_id, flight.taken.number))

    def abandon(self) -> None:
        """Leave all to the next worker."""
        for ticket in list(self._by_ticket):
            self._sampler.cancel(ticket)
        self._by_ticket.clear()
        self.in_order.clear()
        self.free.clear()

    def _find(self, body: dict[str, Any]) -> Source:
        try:
            return self._sources.find(body.get("weights") or {"source": "live"})
        except SignalError as error:
            raise refused_source(error) from error

    def _request(self, flight: Flight) -> Request:
        """Without a seed of its own a request draws from the run's seed and its own place, so a repeat of the
        whole run draws the same."""
        body, taken, source = flight.body, flight.taken, flight.source
        assert source is not None
        own = (self._seed, taken.seq or -taken.number)
        return Request(
            body["prompts"],
            self._tokenizer,
            own if body["seed"] is None else (body["seed"], 0),
            body["max_tokens"],
            n=body["n"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            min_p=body.get("min_p", 0.0),
            first_row=body.get("first_row", 0),
            stop_strings=tuple(body["stop_strings"]),
            stop_token_ids=tuple(body["stop_token_ids"]),
            top_logprobs=body.get("top_logprobs", 0),
            prompt_logprobs=body.get("prompt_logprobs", False),
            prompt_top_logprobs=body.get("top_prompt_logprobs", 0),
            weights=source.weights,
            deterministic=body.get("deterministic", False),
            on_token=self._listener(flight) if body.get("stream") else None,
        )

    def _listener(self, flight: Flight) -> Callable[[int, int, float, str | None], None]:
        n = flight.body["n"]

        def said(row: int, token: int, logprob: float, text: str | None) -> None:
            flight.unsaid.append(
                {
                    "prompt": row // n,
                    "sample": row % n,
                    "token_id": token,
                    "logprob": logprob,
                    "text": text or "",
                }
            )

        return said

    def _announce(self, flight: Flight) -> None:
        if flight.body.get("stream"):
            number = flight.taken.number
            self._try(lambda: tokens.begin(self._journal.redis, self.run_id, number))

    def _try(self, what: Callable[[], None]) -> None:
        """Who watches is told if that is possible; a sample does not end for it."""
        try:
            what()
        except (RedisError, OSError) as error:
            log.warning("%s: the watchers of samples cannot be reached: %s", self.run_id, error)

    def _tell(self) -> None:
        for flight in (*self.in_order, *self.free.values()):
            if flight.unsaid:
                tokens.write(self._journal.redis, self.run_id, flight.taken.number, flight.unsaid)
                flight.unsaid = []

    def _look(self) -> None:
        """Ends those that somebody cancelled."""
        flying = {
            flight.taken.number: ticket
            for ticket, flight in self._by_ticket.items()
            if not flight.of_past
        }
        if not flying:
            return
        for number in self._journal.stops(self.run_id, self._epoch, list(flying)):
            flight = self._by_ticket.pop(flying[number])
            self._sampler.cancel(flying[number])
            error = SignalError("cancelled").to_dict()
            flight.outcome = Outcome("cancelled", error=error)
