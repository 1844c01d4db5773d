"""Submitting operations of one run, in order.

One lock per run: threads may share a run, and what one call submits stays together. A blocking call
does not take it, since it has no place among the submissions of other threads to keep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rewardsignal._exceptions import (
    ConflictError,
    PayloadTooLargeError,
    RateLimitError,
    SignalAPIError,
    SignalConnectionError,
    ValidationError,
)
from rewardsignal._futures import APIFuture
from rewardsignal._poller import Poller
from rewardsignal._schemas import MAX_OPERATIONS
from rewardsignal._split import SplitFuture, named_by_call, parts_of
from rewardsignal._transport import Answer, segment

# Of one request that carries several operations: well below what servers take.
MAX_BYTES = 4 * 2**20

# A future that has no place yet, and its operation as JSON.
Held = tuple[APIFuture[Any], bytes]


class Submitter:
    """The way of one run's operations into its journal."""

    def __init__(self, poller: Poller, run_id: str) -> None:
        """Sends nothing."""
        self.poller = poller
        self.run_id = run_id
        self._path = f"/runs/{segment(run_id)}"
        self._lock = threading.Lock()
        self._last: APIFuture[Any] | None = None

    def submit_one(self, kind: str, body: Mapping[str, Any]) -> APIFuture[Any]:
        """Submit an operation; returns once it has its place in the order."""
        future, held = self.hold(kind, body)
        try:
            self.send(held)
        except (ValidationError, PayloadTooLargeError, ConflictError, RateLimitError):
            if isinstance(future, SplitFuture):
                future.take_back()
            raise
        return future

    def submit_many(self, operations: Iterable[Mapping[str, Any]]) -> list[APIFuture[Any]]:
        """Submit operations by as few requests as the limits allow."""
        pairs = [self.hold(str(one.get("kind")), without_kind(one)) for one in operations]
        self.send([one for _, held in pairs for one in held])
        return [future for future, _ in pairs]

    def hold(
        self, kind: str, body: Mapping[str, Any], flush: Callable[[], None] | None = None
    ) -> tuple[APIFuture[Any], list[Held]]:
        """An operation that is still to be sent, by `flush` if its future is asked before.

        What is too large for one is several that answer as one future.
        """
        parts = parts_of(kind, body)
        futures: list[APIFuture[Any]] = [
            APIFuture(self.poller, self.run_id, kind, flush) for _ in parts
        ]
        held = [(future, content) for future, (_, content) in zip(futures, parts, strict=True)]
        if len(futures) == 1:
            return futures[0], held
        pairs = [(future, part) for future, (part, _) in zip(futures, parts, strict=True)]
        return SplitFuture(self.poller, self.run_id, kind, pairs), held

    def send(self, held: Sequence[Held]) -> None:
        """Send operations in their order. Raises what the server refused; its futures say so too."""
        try:
            self.post(held)
        except BaseException as error:
            for future, _ in held:
                if not future.accepted:
                    future.refuse(why(error))
            raise

    def post(self, held: Sequence[Held]) -> None:
        """As `send`, but what is refused may be sent again: its futures do not say so."""
        with self._lock:
            for part in _parts(held):
                try:
                    self._send_part(part)
                except SignalAPIError as error:
                    raise named_by_call(error, [future for future, _ in part]) from None

    def accepted(self, kind: str, answer: Answer) -> APIFuture[Any]:
        """The future of an answer with status 202."""
        future: APIFuture[Any] = APIFuture(self.poller, self.run_id, kind)
        future.bind(answer.body, answer.request_id)
        return future

    def _send_part(self, part: Sequence[Held]) -> None:
        transport = self.poller.transport
        if len(part) == 1:
            # Alone, so that the names of wrong fields are those of the call.
            future, content = part[0]
            answer = transport.post(f"{self._path}/{segment(future.kind)}_async", content)
            raws = [answer.body]
        else:
            body = b",".join(_with_kind(future.kind, content) for future, content in part)
            answer = transport.post(f"{self._path}/operations", b'{"operations":[' + body + b"]}")
            raws = answer.body["data"]
        for (future, _), raw in zip(part, raws, strict=True):
            future.bind(raw, answer.request_id)
            self._link(future)

    def _link(self, future: APIFuture[Any]) -> None:
        if self._last is not None:
            self._last.follow(future)
        self._last = future


def _parts(held: Sequence[Held]) -> Iterator[Sequence[Held]]:
    """Pieces within the limits of one request."""
    begin, size = 0, 0
    for index, (future, content) in enumerate(held):
        length = len(future.kind) + len(content) + 10
        if index > begin and (index - begin == MAX_OPERATIONS or size + length > MAX_BYTES):
            yield held[begin:index]
            begin, size = index, 0
        size += length
    if begin < len(held):
        yield held[begin:]


def _with_kind(kind: str, content: bytes) -> bytes:
    rest = content[1:]
    return b'{"kind":"' + kind.encode() + (b'"' if rest == b"}" else b'",') + rest


def without_kind(operation: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a submitted operation's call."""
    return {name: value for name, value in operation.items() if name != "kind"}


def why(error: BaseException) -> Exception:
    """What a future says when its operation could not be sent."""
    if isinstance(error, Exception):
        return error
    return SignalConnectionError("Interrupted while it was being sent.")
