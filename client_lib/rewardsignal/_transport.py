"""HTTP: one keep-alive pool, the retries, and the way from an answer to a record or an exception.

Every POST carries an Idempotency-Key that stays the same over all its retries, so a repeat after a
lost answer gets the first answer. A repeat happens only where it can help: no connection, 429, 502,
503, 504; never when the server says that the error is stable. This module knows no endpoint.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlencode

import httpx2

from rewardsignal._exceptions import (
    AuthenticationError,
    OperationFailedError,
    SignalAPIError,
    SignalConnectionError,
    SignalTimeoutError,
    ValidationError,
    from_failed_future,
    from_response,
)
from rewardsignal._version import __version__

CLOSED = "This client is closed."
RETRIED = frozenset((429, 502, 503, 504))
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
# A wrong base URL should say so at once; a server that has answered before is worth waiting for.
UNSEEN_RETRY_S = 2.0
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=60.0)


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its decoded JSON body and what is needed of its head."""

    status: int
    body: Any
    request_id: str | None


class Transport:
    """Sends requests of one user to one server; safe to share between threads."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout: float,
        retry_for: float,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        """`timeout` bounds one exchange, `retry_for` all retries of one call, both in seconds."""
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.retry_for = retry_for
        self._seen = False
        self._closed = threading.Event()
        self._read = self._headers(api_key)
        self._write = httpx2.Headers({**self._read, "Content-Type": "application/json"})
        # The trusted certificates take 35 ms to load; http:// has no use for them.
        secure = self.base_url.startswith("https:")
        self._http = httpx2.Client(
            transport=transport, verify=secure, timeout=timeout, limits=_LIMITS
        )
        # Who does not close the client leaves no socket behind all the same.
        weakref.finalize(self, self._http.close)

    def _headers(self, api_key: str) -> httpx2.Headers:
        try:
            url = httpx2.URL(self.base_url)
            if url.scheme not in ("http", "https") or not url.host:
                raise ValueError
        except (ValueError, httpx2.InvalidURL):
            message = f"base_url is not an http(s) address: {self.base_url!r}"
            raise SignalConnectionError(message) from None
        # Made once: a header that cannot be sent is found here and not in the middle of training.
        if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
            raise AuthenticationError("The API key has characters that no key has: copy it again.")
        return httpx2.Headers(
            {
                "Host": url.netloc.decode(),
                "Authorization": f"Bearer {api_key}",
                "Accept": "application/json",
                "User-Agent": f"rewardsignal/{__version__}",
            }
        )

    def get(
        self, path: str, query: Mapping[str, Any] | None = None, *, held: float = 0.0
    ) -> Answer:
        """GET; `held` is how long the server may keep the answer back."""
        return self._send("GET", path_with(path, query), None, self._read, held)

    def post(
        self, path: str, body: bytes, *, key: str | None = None, patience: float | None = None
    ) -> Answer:
        """POST of encoded JSON, by default under a new Idempotency-Key.

        `patience` bounds its retries, and each attempt, where less than usual is wanted.
        """
        headers = self._write.copy()
        headers["Idempotency-Key"] = key or uuid.uuid4().hex
        return self._send("POST", path, body, headers, 0.0, patience)

    def delete(self, path: str, *, held: float = 0.0) -> Answer:
        """DELETE; `held` is how long the server may take for it."""
        return self._send("DELETE", path, None, self._read, held)

    @contextmanager
    def stream(self, path: str, offset: int) -> Iterator[httpx2.Response]:
        """GET of a file from `offset`, one attempt; errors of the network come as ours."""
        headers = self._read.copy()
        headers["Accept"] = "*/*"
        if offset:
            headers["Range"] = f"bytes={offset}-"
        request = self._request("GET", path, None, headers, self.timeout)
        with _our_errors(self.base_url):
            response = self._http.send(request, stream=True)
            try:
                if response.status_code >= 400:
                    response.read()
                    raise _error_of(response)
                yield response
            finally:
                response.close()

    @contextmanager
    def events(self, path: str, body: bytes) -> Iterator[httpx2.Response]:
        """POST that is answered by Server-Sent Events, until the block ends.

        Refusals are raised, and repeated where that helps, as those of any POST.
        """
        headers = self._write.copy()
        headers["Idempotency-Key"] = uuid.uuid4().hex
        headers["Accept"] = "text/event-stream"
        attempt, until = 0, self.retry_until()
        while True:
            try:
                response = self._opened(path, body, headers)
                break
            except SignalAPIError as error:
                self.pause(error, attempt, until)
            attempt += 1
        try:
            yield response
        finally:
            response.close()

    def _opened(self, path: str, body: bytes, headers: httpx2.Headers) -> httpx2.Response:
        request = self._request("POST", path, body, headers, self.timeout)
        with _our_errors(self.base_url):
            response = self._http.send(request, stream=True)
            if response.status_code >= 400:
                response.read()
                raise _error_of(response)
        return response

    def close(self) -> None:
        """Close the connections; a call that waits for a retry gives up."""
        self._closed.set()
        self._http.close()

    def retry_until(self) -> float:
        """When the retries of a call that begins now end."""
        return time.monotonic() + (
            self.retry_for if self._seen else min(UNSEEN_RETRY_S, self.retry_for)
        )

    def pause(self, error: SignalAPIError, attempt: int, until: float) -> None:
        """Wait before the next attempt, or raise `error` when another cannot help."""
        if not _may_retry(error):
            raise error
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)
        pause = max(pause, getattr(error, "retry_after", None) or 0.0)
        if time.monotonic() + pause > until or self._closed.wait(pause):
            raise error

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: httpx2.Headers,
        held: float,
        patience: float | None = None,
    ) -> Answer:
        attempt, until, timeout = 0, self.retry_until(), self.timeout + held
        if patience is not None:
            until, timeout = min(until, time.monotonic() + patience), min(timeout, patience)
        while True:
            try:
                return self._once(method, path, body, headers, timeout)
            except SignalAPIError as error:
                self.pause(error, attempt, until)
            attempt += 1

    def _once(
        self, method: str, path: str, body: bytes | None, headers: httpx2.Headers, timeout: float
    ) -> Answer:
        if self._closed.is_set():
            raise SignalConnectionError(CLOSED)
        request = self._request(method, path, body, headers, timeout)
        with _our_errors(self.base_url):
            response = self._http.send(request)
        self._seen = True
        if not 200 <= response.status_code < 300:
            raise _error_of(response)
        request_id = response.headers.get("X-Request-Id")
        return Answer(response.status_code, _decode(response), request_id)

    def _request(
        self, method: str, path: str, body: bytes | None, headers: httpx2.Headers, timeout: float
    ) -> httpx2.Request:
        # Built by hand: httpx2's own `request` merges URLs, headers and cookies for 150 us more.
        limits = {"connect": 10.0, "read": timeout, "write": timeout, "pool": timeout}
        return httpx2.Request(
            method,
            _url(self.base_url + path) if "?" not in path else self.base_url + path,
            headers=headers,
            content=body,
            extensions={"timeout": limits},
        )


@lru_cache(maxsize=256)
def _url(text: str) -> httpx2.URL:
    # A loop calls the same few addresses; to parse one costs 70 us.
    return httpx2.URL(text)


def encode(body: Any) -> bytes:
    """Strict JSON; arrays and tensors (anything with `tolist`) become lists."""
    try:
        text = json.dumps(
            body, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_as_list
        )
        return text.encode()
    except (ValueError, TypeError) as error:
        message = f"The request cannot be sent as JSON: {error}"
        raise ValidationError(message, response_data={"code": "malformed_json"}) from error


def path_with(path: str, query: Mapping[str, Any] | None) -> str:
    """`path` with the query's values that are set."""
    given = {name: value for name, value in (query or {}).items() if value is not None}
    return f"{path}?{urlencode(given, safe=',')}" if given else path


def segment(text: str, safe: str = "") -> str:
    """A piece of a path, quoted; a dot segment would lead to another endpoint."""
    if not text or set(text.split("/")) & {"", ".", ".."}:
        raise ValidationError(f"Not a valid name: {text!r}")
    return quote(text, safe=safe)


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _decode(response: httpx2.Response) -> Any:
    if response.status_code == 204:
        return None
    try:
        return json.loads(response.content)
    except ValueError:
        message = "The answer is not JSON: does base_url lead to a Signal server?"
        raise SignalAPIError(message, response.status_code) from None


def _error_of(response: httpx2.Response) -> SignalAPIError:
    try:
        body = json.loads(response.content)["error"]
        body = body if isinstance(body, dict) else None
    except (ValueError, KeyError, TypeError):
        body = None
    request_id = response.headers.get("X-Request-Id")
    if "Signal-Future-Id" in response.headers:
        # A blocking call whose operation was accepted and failed on the worker.
        return from_failed_future("failed", body, request_id)
    error = from_response(response.status_code, body, request_id)
    error.retry_after = _retry_after(response.headers.get("Retry-After"))
    return error


def _retry_after(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _may_retry(error: SignalAPIError) -> bool:
    if isinstance(error, SignalConnectionError | SignalTimeoutError):
        return True
    # An operation that has ended: under its Idempotency-Key a repeat would read the same end again.
    if isinstance(error, OperationFailedError):
        return False
    stable = error.response_data.get("retryable") is False
    return error.status_code in RETRIED and not stable


@contextmanager
def _our_errors(base_url: str) -> Iterator[None]:
    try:
        yield
    except httpx2.ConnectTimeout as error:
        raise SignalConnectionError(f"{base_url} cannot be reached: {error}") from error
    except httpx2.TimeoutException as error:
        raise SignalTimeoutError(f"{base_url} did not answer in time.") from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise SignalConnectionError(f"{base_url} cannot be reached: {error}") from error
    except RuntimeError as error:
        # What httpx2 raises once its client is closed, also by another thread.
        if "closed" not in str(error):
            raise
        raise SignalConnectionError(CLOSED) from error
