"""A sample token by token: Server-Sent Events in, tokens out."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2

from rewardsignal._exceptions import SignalAPIError, SignalConnectionError, from_failed_future
from rewardsignal._futures import APIFuture
from rewardsignal._poller import Poller
from rewardsignal._schemas import SampleResult
from rewardsignal._transport import Transport


@dataclass(frozen=True, slots=True)
class StreamToken:
    """A token of a sample under way.

    `prompt` and `sample` say of which, `text` is what it adds for sure (the last bytes of a character wait
    for its end). `restart`: a worker was lost, every token so far is void and comes again; it has no token.
    """

    prompt: int = 0
    sample: int = 0
    token_id: int | None = None
    logprob: float | None = None
    text: str = ""
    restart: bool = False


class SampleStream:
    """The tokens of one sample as they come; made by `run.stream_sample()`.

    Iterate over it; leaving it (`with`, `close`) before its end cancels the sample. Afterwards `result()`
    is the whole answer, as `sample` gives it.
    """

    def __init__(self, poller: Poller, run_id: str, path: str, body: bytes) -> None:
        """Submits the sample; raises what the server refuses."""
        self._exit = ExitStack()
        self._result: SampleResult | None = None
        self._over = False
        self.future: APIFuture[SampleResult] = APIFuture(poller, run_id, "sample")
        first = self._begin(poller.transport, path, body)
        self._request_id = self._lines.headers.get("X-Request-Id")
        self.future.bind(first, self._request_id)

    def _begin(self, transport: Transport, path: str, body: bytes) -> dict[str, Any]:
        """The first event. A stream that breaks before it has cancelled its sample: another is asked for."""
        attempt, until = 0, transport.retry_until()
        while True:
            self._lines = self._exit.enter_context(transport.events(path, body))
            self._events = _events(self._lines)
            name, first = next(self._events, ("", {}))
            if name == "future":
                return first
            self._exit.close()
            broken = SignalConnectionError("The stream of the sample ended before it began.")
            transport.pause(broken, attempt, until)
            attempt += 1

    def __iter__(self) -> Iterator[StreamToken]:
        """The tokens, in the order in which they were sampled. Raises OperationFailedError.

        Where the connection breaks, the tokens stop. To the server that is hanging up, which cancels what
        has not ended: `result()` is the whole answer or raises OperationCancelledError, never a part.
        """
        try:
            for name, data in self._events:
                if name == "token":
                    yield _token(data)
                elif name == "restart":
                    yield StreamToken(restart=True)
                elif name == "result":
                    self._over, self._result = True, SampleResult.from_dict(data)
                elif name == "error":
                    self._over = True
                    raise from_failed_future("failed", data["error"], self._request_id)
        finally:
            self.close()

    def result(self, timeout: float | None = None) -> SampleResult:
        """The whole answer; what has not been read of the stream is read, and given away."""
        for _ in self:
            pass
        return self._result or self.future.result(timeout)

    def close(self) -> None:
        """Hang up: a sample that has not ended is cancelled."""
        self.hang_up()
        self._exit.close()

    def hang_up(self) -> None:
        """End the connection, also while another thread waits for its next token; that one sees the end."""
        network = self._lines.extensions.get("network_stream")
        line = None if self._over or network is None else network.get_extra_info("socket")
        if line is not None:
            self._over = True
            # Closing it would not wake who reads, nor tell the server before that one has woken.
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SampleStream of {self.future!r}>"


def _token(data: Mapping[str, Any]) -> StreamToken:
    return StreamToken(
        prompt=data["prompt"],
        sample=data["sample"],
        token_id=data["token_id"],
        logprob=data.get("logprob"),
        text=data["text"] or "",
    )


def _events(response: httpx2.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a response, which may break off: then they just end."""
    name, data = "", ""
    try:
        for line in response.iter_lines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data += line[5:].strip()
            elif not line and name:
                yield name, json.loads(data)
                name, data = "", ""
    except (httpx2.TransportError, httpx2.StreamError):
        return
    except ValueError as error:
        raise SignalAPIError(f"The server sent an event that is no JSON: {error}") from error
