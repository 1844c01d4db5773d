"""A continuous batch: who may join, one token for every row, who has ended, what failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from schemas.errors import SignalError
from workers.engine.base import Base
from workers.engine.choose import Choice, Likeliest, Settings, choose_rows
from workers.engine.generation.admission import Admission
from workers.engine.generation.draws import drawn_by
from workers.engine.generation.lane import Lane
from workers.engine.generation.replays import Capture, capture_for
from workers.engine.generation.request import Request, check
from workers.engine.generation.scoring import score
from workers.engine.generation.ticket import Row, Ticket
from workers.engine.memory import is_out_of_memory


class Generator:
    """Samples requests of any adapters on one base together; requests join and leave between tokens.

    Keys and values take up to `cache_bytes`, except that one row always fits; requests beyond that wait in
    the order of their arrival. Not for several threads at once.
    """

    def __init__(
        self, base: Base, *, cache_bytes: int, capture: Capture | Literal["auto"] | None = "auto"
    ) -> None:
        """Nothing is allocated before the first request, and nothing is kept behind the last but, where
        steps are captured, a part of the cache. `capture` is how, None: they are not; "auto": as is best
        on the base's device."""
        self._base = base
        how = capture_for(base.device) if capture == "auto" else capture
        self._admission = Admission(base, cache_bytes, how)
        self._arrivals = 0
        self._stepping = False
        self._ended: list[Ticket] = []

    @property
    def active(self) -> int:
        """Rows that get a token in each step."""
        return sum(len(lane.rows) for lane in self._admission.lanes)

    @property
    def waiting(self) -> int:
        """Rows that wait for room."""
        return sum(len(ticket.waiting) for ticket in self._admission.queue)

    def submit(self, request: Request) -> Ticket:
        """Take a request; it begins with the next step that has room for it.

        Raises SignalError, which names the field, for what the model or its base cannot do.
        """
        check(request, self._base)
        ticket = Ticket(self._arrivals, request, self._base.context_length)
        self._arrivals += 1
        self._admission.join(ticket)
        self._admission.number()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request with what it has got: its output says that it was cancelled. Nothing happens when it
        has ended."""
        if ticket.done:
            return
        ticket.finish(cancelled=True)
        if not self._stepping:
            self._sweep()

    def step(self) -> list[Ticket]:
        """One token for every active row, those that join now included; the tickets that ended, by an error
        too. What fails for one request is in its ticket and touches no other."""
        self._ended, self._stepping = [], True
        try:
            # Not inference_mode: tables that a model keeps (rotary ones) must stay usable in training.
            with torch.no_grad():
                self._score()
                for lane, new in self._admission.admitted():
                    self._advance_or_fail(lane, new)
        except BaseException:
            self._restart()
            raise
        finally:
            self._stepping = False
            self._sweep()
        return self._ended

    def _restart(self) -> None:
        """A step broke off somewhere: whoever was sampled begins anew behind what he has got, except that
        bits which must not depend on it are given up."""
        for row in self._admission.unseated():
            if row.ticket.request.deterministic:
                self._fail(row.ticket, SignalError("operation_failed"))
            else:
                self._admission.put_back(row)

    def _sweep(self) -> None:
        self._admission.sweep()
        self._admission.number()

    def _score(self) -> None:
        """The scores of the first ticket that lacks them: one in a step, so that others go on."""
        ticket = next((one for one in self._admission.queue if one.unscored), None)
        if ticket is None:
            return
        try:
            ticket.scores = score(self._base, ticket.request)
        except Exception as error:
            self._fail(ticket, _of_one(error))
        self._finish_complete(ticket)

    def _advance_or_fail(self, lane: Lane, new: Sequence[Row]) -> None:
        """One token for each row of a lane; an error in the lane of one request is that request's."""
        new = [row for row in new if row.alive]
        tickets = {row.ticket for row in (*lane.rows, *new)}
        try:
            self._advance(lane, new)
        except Exception as error:
            if self._admission.is_shared(lane):
                raise
            for ticket in tickets:
                self._fail(ticket, _of_one(error))

    def _advance(self, lane: Lane, new: Sequence[Row]) -> None:
        """One token for each row of a lane and for the new ones."""
        parts = [self._decoded(lane)] if lane.rows else []
        if new:
            parts += self._taken_in(lane, list(new))
        rows = list(lane.rows)
        if rows:
            parts = [part for part in parts if len(part)]
            self._sample(lane, rows, torch.cat(parts) if len(parts) > 1 else parts[0])
        alive = [row for row in rows if row.alive]
        if new or len(alive) < len(rows):
            lane.keep(alive)

    def _decoded(self, lane: Lane) -> Tensor:
        """The hidden state of each row; out of memory, of the older half of them."""
        while True:
            try:
                return lane.decode()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Behind the except clause, whose error holds the memory of the pass.
            self._release()
            self._yield_half(lane)
            self._admission.stall()
            if not lane.rows:
                return torch.empty(0, 0)

    def _yield_half(self, lane: Lane) -> None:
        """Take the newest rows of a lane out, to be continued later; a last one fails, and so do those whose
        bits depend on who steps with them."""
        rows = sorted(lane.rows, key=lambda row: row.order)
        half = len(rows) // 2
        for row in rows[half:]:
            if half and not row.ticket.request.deterministic:
                self._admission.put_back(row)
            else:
                self._fail(row.ticket, SignalError("out_of_memory"))
        lane.keep([row for row in rows[:half] if row.alive])

    def _taken_in(self, lane: Lane, new: list[Row]) -> list[Tensor]:
        """The hidden states of new rows; of as many as there is memory for, the others wait on."""
        while new:
            try:
                return [lane.admit(new)]
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self._release()
            self._admission.stall(len(new) // 2)
            alone = self.active == 0
            half = len(new) // 2
            for row in reversed(new[half:]):
                if row.ticket.request.deterministic or (alone and not half):
                    self._fail(row.ticket, SignalError("out_of_memory"))
                else:
                    self._admission.put_back(row)
            new = [row for row in new[:half] if row.alive]
        return []

    def _release(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _sample(self, lane: Lane, rows: Sequence[Row], hidden: Tensor) -> None:
        """Draw a token for each row and give it to it; out of memory, for halves of them."""
        try:
            made = self._chosen(lane, rows, hidden)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            made = None
        if made is not None:
            self._deliver(rows, made)
        elif len(rows) == 1 or rows[0].ticket.request.deterministic:
            self._fail(rows[0].ticket, SignalError("out_of_memory"))
        else:
            half = len(rows) // 2
            self._sample(lane, rows[:half], hidden[:half])
            self._sample(lane, rows[half:], hidden[half:])

    def _chosen(self, lane: Lane, rows: Sequence[Row], hidden: Tensor) -> Choice:
        drawn = np.array(drawn_by(rows))
        settings = _settings(tuple(row.settings for row in rows))
        logits = lane.logits(hidden, rows)
        return choose_rows(logits, torch.from_numpy(drawn).to(logits.device), settings)

    def _deliver(self, rows: Sequence[Row], made: Choice) -> None:
        ids, logprobs = made.ids.tolist(), made.logprobs.tolist()
        # Who listens hears rows in their order, wherever they lie.
        for at in sorted(range(len(rows)), key=lambda at: rows[at].order):
            if rows[at].alive:
                self._hand_over(rows[at], ids[at], logprobs[at], made.top.get(at))

    def _hand_over(self, row: Row, token: int, logprob: float, top: Likeliest | None) -> None:
        if not math.isfinite(logprob):
            message = "The model's logits are not finite; nothing was changed."
            self._fail(row.ticket, SignalError("non_finite", message))
            return
        try:
            row.add(token, logprob, top)
        except Exception as error:
            # A listener's or a tokenizer's: it must not end the requests beside it.
            self._fail(row.ticket, _of_one(error))
        self._finish_complete(row.ticket)

    def _fail(self, ticket: Ticket, error: SignalError) -> None:
        if not ticket.done:
            ticket.fail(error)
            self._ended.append(ticket)

    def _finish_complete(self, ticket: Ticket) -> None:
        if not ticket.done and ticket.complete:
            ticket.finish()
            self._ended.append(ticket)


@lru_cache(maxsize=64)
def _settings(rows: tuple[tuple[float, ...], ...]) -> Settings:
    """The same rows ask for the same, token after token."""
    return Settings.of(rows)


def _of_one(error: Exception) -> SignalError:
    """What a request's own error is to who asked for it."""
    if isinstance(error, SignalError):
        return error
    message = f"The request failed and ended: {type(error).__name__}: {error}"
    return SignalError("operation_failed", message)
