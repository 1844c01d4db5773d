"""Submitting operations of one run, in order.

One lock per run: threads may share a run, and what one call submits stays together. A blocking call
does not take it, since it has no place among the submissions of other threads to keep.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rewardsignal._exceptions import SignalConnectionError
from rewardsignal._futures import APIFuture
from rewardsignal._poller import Poller
from rewardsignal._schemas import MAX_OPERATIONS
from rewardsignal._transport import Answer, encode, segment

# Well below what servers take, so that one request is never refused for its size alone.
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
        content = encode(body)
        with self._lock:
            answer = self.poller.transport.post(f"{self._path}/{kind}_async", content)
            return self._link(self.accepted(kind, answer))

    def submit_many(self, operations: Iterable[Mapping[str, Any]]) -> list[APIFuture[Any]]:
        """Submit operations by as few requests as the limits allow."""
        held = [self.hold(str(one.get("kind")), one) for one in operations]
        self.send(held)
        return [future for future, _ in held]

    def hold(
        self, kind: str, body: Mapping[str, Any], flush: Callable[[], None] | None = None
    ) -> Held:
        """An operation that is still to be sent, by `flush` if its future is asked before."""
        future: APIFuture[Any] = APIFuture(self.poller, self.run_id, kind, flush)
        return future, encode({"kind": kind, **body})

    def send(self, held: Sequence[Held]) -> None:
        """Send operations in their order. Raises what the server refused; its futures say so too."""
        with self._lock:
            try:
                for part in _parts(held):
                    self._send_part(part)
            except BaseException as error:
                for future, _ in held:
                    if not future.accepted:
                        future.refuse(_why(error))
                raise

    def accepted(self, kind: str, answer: Answer) -> APIFuture[Any]:
        """The future of an answer with status 202."""
        future: APIFuture[Any] = APIFuture(self.poller, self.run_id, kind)
        future.bind(answer.body, answer.request_id)
        return future

    def _send_part(self, part: Sequence[Held]) -> None:
        body = b'{"operations":[' + b",".join(content for _, content in part) + b"]}"
        answer = self.poller.transport.post(f"{self._path}/operations", body)
        for (future, _), raw in zip(part, answer.body["data"], strict=True):
            future.bind(raw, answer.request_id)
            self._link(future)

    def _link(self, future: APIFuture[Any]) -> APIFuture[Any]:
        if self._last is not None:
            self._last.follow(future)
        self._last = future
        return future


def _parts(held: Sequence[Held]) -> Iterator[Sequence[Held]]:
    """Pieces within the limits of one request."""
    begin, size = 0, 0
    for index, (_, content) in enumerate(held):
        if index > begin and (index - begin == MAX_OPERATIONS or size + len(content) > MAX_BYTES):
            yield held[begin:index]
            begin, size = index, 0
        size += len(content) + 1
    if begin < len(held):
        yield held[begin:]


def _why(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    return SignalConnectionError("Interrupted while it was being sent.")
