"""Which rows may join a batch: in the order of arrival, as far as the cache has room.

Room is counted in positions. What a lane takes is its rows times the most that the longest of them may come
to need. Rows that must not lie beside others (of deterministic requests, and all on decoders of transformers)
get lanes of their own, in waves whose sizes depend on the request alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from workers.engine.base import Base
from workers.engine.generation.lane import BatchLane, Lane, SlabLane
from workers.engine.generation.prefill import MOST_TOKENS
from workers.engine.generation.replays import Capture
from workers.engine.generation.ticket import Row, Ticket
from workers.engine.llama import Llama


class Admission:
    """`queue` are the tickets with rows that wait, in the order of arrival; `lanes` the rows that step."""

    def __init__(self, base: Base, cache_bytes: int, capture: Capture | None) -> None:
        """The cache may take `cache_bytes`. Only steps of the shared lane are captured: which are, depends on
        what came before, and a lane of one request must not."""
        self._base = base
        self._room = max(1, cache_bytes // base.decoder.cache_bytes_per_token)
        decoder = base.decoder
        self._shared: SlabLane | None = None
        if isinstance(decoder, Llama):
            self._shared = SlabLane(base, decoder, self._room, capture)
        # With the room that each has taken for good.
        self._private: list[tuple[Lane, int]] = []
        self.queue: list[Ticket] = []
        # All that have not ended.
        self._at_work: list[Ticket] = []
        # The rows that were active when memory ran out: none joins before there are fewer.
        self._stalled: int | None = None

    @property
    def lanes(self) -> list[Lane]:
        """All lanes, the shared one first."""
        shared: list[Lane] = [] if self._shared is None else [self._shared]
        return shared + [lane for lane, _ in self._private]

    def is_shared(self, lane: Lane) -> bool:
        """Whether rows of several requests are in a lane."""
        return lane is self._shared

    def join(self, ticket: Ticket) -> None:
        """Put a ticket into its place in the queue, unless it is there."""
        if ticket not in self._at_work:
            self._at_work.append(ticket)
        if ticket not in self.queue:
            self.queue.append(ticket)
            self.queue.sort(key=lambda one: one.number)

    def put_back(self, row: Row) -> None:
        """Let a row wait, before others of its ticket."""
        row.ticket.waiting.appendleft(row)
        self.join(row.ticket)

    def unseated(self) -> list[Row]:
        """Empty all lanes; the rows that are neither there any more nor wait, the first ones last."""
        for lane in self.lanes:
            lane.keep([])
        waiting = {id(row) for ticket in self.queue for row in ticket.waiting}
        rows = [row for ticket in self._at_work for row in ticket.rows]
        left = [row for row in rows if row.alive and id(row) not in waiting]
        return sorted(left, key=lambda row: row.order, reverse=True)

    def stall(self, joining: int = 0) -> None:
        """Memory ran out: whoever waits waits until a row has left, of those that are active and are
        joining."""
        self._stalled = sum(len(lane.rows) for lane in self.lanes) + joining

    def sweep(self) -> None:
        """Let go of what has ended."""
        for lane in self.lanes:
            if not all(row.alive for row in lane.rows):
                lane.keep([row for row in lane.rows if row.alive])
        self._private = [(lane, room) for lane, room in self._private if lane.rows]
        self._at_work = [ticket for ticket in self._at_work if not ticket.done]
        self.queue = [one for one in self.queue if not one.done and (one.waiting or one.unscored)]

    def number(self) -> None:
        """Give every ticket that waits as a whole its position."""
        at_work = {id(row.ticket) for lane in self.lanes for row in lane.rows}
        for lane in self.lanes:
            for row in lane.rows:
                row.ticket.position = 0
        for place, ticket in enumerate(self.queue):
            ticket.position = 0 if id(ticket) in at_work else place + 1

    def admitted(self) -> Iterator[tuple[Lane, list[Row]]]:
        """Each lane with the rows that join it now."""
        shared, begun = self._next()
        for lane in self.lanes:
            yield lane, begun.get(id(lane), shared if lane is self._shared else [])

    def _next(self) -> tuple[list[Row], dict[int, list[Row]]]:
        shared: list[Row] = []
        begun: dict[int, list[Row]] = {}
        while not self._blocked() and self.queue and not self.queue[0].unscored:
            ticket = self.queue[0]
            if not ticket.waiting:
                # It had nothing but its scores to wait for.
                self.queue.pop(0)
                continue
            if self._alone(ticket):
                if not self._begin(ticket, shared, begun):
                    break
            elif not self._add(ticket, shared):
                break
            if not ticket.waiting:
                self.queue.pop(0)
        return shared, begun

    def _blocked(self) -> bool:
        if self._stalled is not None:
            active = sum(len(lane.rows) for lane in self.lanes)
            if active and active >= self._stalled:
                return True
            self._stalled = None
        return False

    def _alone(self, ticket: Ticket) -> bool:
        return self._shared is None or ticket.request.deterministic

    def _add(self, ticket: Ticket, shared: list[Row]) -> bool:
        """Move rows of a ticket that fit the shared lane; whether all did."""
        assert self._shared is not None
        taken = sum(room for _, room in self._private)
        count, longest = len(self._shared.rows) + len(shared), self._longest(shared)
        computed = sum({tuple(row.tokens): len(row.tokens) for row in shared}.values())
        while ticket.waiting:
            row = ticket.waiting[0]
            longest = max(longest, row.need)
            fits = (count + 1) * longest + taken <= self._room or not (count or self._private)
            if shared and row.tokens != shared[-1].tokens:
                computed += len(row.tokens)
            if not fits or (shared and computed > MOST_TOKENS):
                return False
            shared.append(ticket.waiting.popleft())
            count += 1
        return True

    def _longest(self, shared: list[Row]) -> int:
        assert self._shared is not None
        return max([self._shared.longest, *(row.need for row in shared)])

    def _begin(self, ticket: Ticket, shared: list[Row], begun: dict[int, list[Row]]) -> bool:
        """Begin the next wave of a ticket in a lane of its own, if there is room for all of it."""
        wave = self._wave(ticket)
        room = len(wave) * max(row.need for row in wave)
        used = sum(taken for _, taken in self._private)
        if self._shared is not None:
            used += (len(self._shared.rows) + len(shared)) * self._longest(shared)
        if used and used + room > self._room:
            return False
        lane = self._lane()
        self._private.append((lane, room))
        begun[id(lane)] = wave
        for _ in wave:
            ticket.waiting.popleft()
        return True

    def _wave(self, ticket: Ticket) -> list[Row]:
        """The rows that fit an empty cache together."""
        wave: list[Row] = []
        longest = 0
        for row in ticket.waiting:
            longest = max(longest, row.need)
            if wave and longest * (len(wave) + 1) > self._room:
                break
            wave.append(row)
        return wave

    def _lane(self) -> Lane:
        decoder = self._base.decoder
        if isinstance(decoder, Llama):
            return SlabLane(self._base, decoder, self._room)
        return BatchLane(self._base)
