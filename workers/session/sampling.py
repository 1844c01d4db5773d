"""Samples under way on one worker: those of all its runs are one batch, fed and emptied between tokens.

Imports no torch by itself: a worker says hello before it loads that.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from workers.session.errors import as_signal_error, leave_broken_device

if TYPE_CHECKING:
    from workers.engine.base import Base
    from workers.engine.generation import Generator, Request, Ticket

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30
# What sampling may take of the time while there are other operations to execute.
SHARE = 0.25


class Owner(Protocol):
    """Who is told that a ticket has ended."""

    run_id: str

    def landed(self, ticket: Ticket) -> None:
        """The ticket has ended, well or not."""
        ...

    def attend(self) -> None:
        """Between tokens: tell who watches, and look who gives up."""
        ...


class Sampler:
    """The batch of a worker. One thread; requests of several runs at once."""

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        """Keys and values take up to `cache_bytes`."""
        self._cache_bytes = cache_bytes
        self._base: Base | None = None
        self._generator: Generator | None = None
        self._owners: dict[Ticket, Owner] = {}
        self._rested_at = time.monotonic()
        # Whether something had to wait for memory at the last step: what else comes waits in the journal,
        # where its position is to be seen.
        self.full = False

    def use(self, base: Base) -> None:
        """Sample on this base from now on; nothing is under way on another."""
        from workers.engine.generation import Generator

        if base is not self._base:
            self._base, self._generator = base, Generator(base, cache_bytes=self._cache_bytes)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._owners)

    @property
    def oldest(self) -> str:
        """The run whose sample has been under way for longest; "" when there is none."""
        return next(iter(self._owners.values())).run_id if self._owners else ""

    def submit(self, owner: Owner, request: Request) -> Ticket:
        """Begin a request. Raises SignalError that names the field."""
        assert self._generator is not None
        ticket = self._generator.submit(request)
        self._owners[ticket] = owner
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request with what it has got; its owner is not told."""
        if self._owners.pop(ticket, None) is not None and self._generator is not None:
            self._generator.cancel(ticket)
            self.full = self._generator.waiting > 0

    def step(self) -> None:
        """One token for every sample under way."""
        if not self._owners or self._base is None or self._generator is None:
            return
        ended = self._stepped(self._base, self._generator)
        self.full = self._generator.waiting > 0
        for ticket in ended:
            owner = self._owners.pop(ticket, None)
            if owner is not None:
                owner.landed(ticket)
        for owner in {id(owner): owner for owner in self._owners.values()}.values():
            owner.attend()

    def _stepped(self, base: Base, generator: Generator) -> list[Ticket]:
        """The tickets that ended; all of them where the batch itself is broken."""
        try:
            with base.set_aside():
                return generator.step()
        except Exception as error:
            log.exception("the batch failed")
            leave_broken_device(error)
            self._base = self._generator = None
            self.use(base)
            for ticket in self._owners:
                ticket.fail(as_signal_error(error))
            return list(self._owners)

    def share(self) -> None:
        """A token at least, and so many that sampling has had its share of the time since the last call."""
        begun = time.monotonic()
        until = begun + SHARE * (begun - self._rested_at)
        while self._owners:
            self.step()
            if time.monotonic() >= until:
                break
        self._rested_at = time.monotonic()
