"""The exceptions of the SDK: one tree.

    SignalAPIError
    ├── AuthenticationError         401
    ├── AuthorizationError          403
    ├── NotFoundError               404, 410
    ├── ValidationError             400, 405, 406, 415, 416, 422
    ├── ConflictError               409
    ├── PayloadTooLargeError        413
    ├── RateLimitError              429
    ├── ServerError                 5xx
    ├── SignalConnectionError       no answer; also a builtin ConnectionError
    ├── SignalTimeoutError          no answer in time; also a builtin TimeoutError
    └── OperationFailedError        424, and every failed future
        ├── InvalidOperationError   … whose code is a 422; also a ValidationError
        ├── OperationConflictError  … whose code is a 409; also a ConflictError
        └── OperationCancelledError … that was cancelled

A blocking call raises what the server refused at once and what its worker found later by the same
classes: `except ConflictError` catches `no_gradients` from `run.optim_step()` and from a future.
This module imports nothing of ours but the generated table of codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewardsignal._schemas import ERROR_STATUS


class SignalAPIError(Exception):
    """The server answered with an error."""

    def __init__(
        self,
        message: str | None = None,
        status_code: int | None = None,
        response_data: Mapping[str, Any] | None = None,
        *,
        request_id: str | None = None,
    ) -> None:
        """`response_data` is the inside of the error shape: code, message, param, details."""
        self.response_data: dict[str, Any] = dict(response_data or {})
        self.message: str = message or self.response_data.get("message") or type(self).__doc__ or ""
        self.status_code = status_code
        self.request_id: str | None = request_id or self.response_data.get("request_id")
        self.retry_after: float | None = None
        super().__init__(self.message)

    @property
    def code(self) -> str | None:
        """The code of the error table, such as `sequence_too_long`."""
        return self.response_data.get("code")

    @property
    def param(self) -> str | None:
        """The dotted path of the first wrong field, such as `batch_data.0.tokens`."""
        return self.response_data.get("param")

    @property
    def details(self) -> list[dict[str, Any]]:
        """Every wrong field: `param`, `code` and `message` of each."""
        return list(self.response_data.get("details") or ())

    @property
    def data(self) -> dict[str, Any]:
        """Facts for a program: `at_seq` of `rolled_back`, `queued` of `queue_full`."""
        return dict(self.response_data.get("data") or {})

    @property
    def retryable(self) -> bool:
        """Whether the same call can succeed later."""
        return bool(self.response_data.get("retryable", False))

    def __str__(self) -> str:
        facts = {"code": self.code, "param": self.param, "request_id": self.request_id}
        told = ", ".join(f"{name}={value}" for name, value in facts.items() if value)
        return f"{self.message} [{told}]" if told else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle would call the class with `args` alone and lose the rest.
        facts = (self.message, self.status_code, self.response_data, self.request_id)
        return (_rebuild, (type(self), *facts))


class AuthenticationError(SignalAPIError):
    """There is no API key, or not a valid one."""


class AuthorizationError(SignalAPIError):
    """The API key may not do this."""


class NotFoundError(SignalAPIError):
    """There is no such thing (any more), or it is not yours."""


class ValidationError(SignalAPIError):
    """The server refused the request; `details` names each wrong field."""


class ConflictError(SignalAPIError):
    """The state of the run or of the operation does not allow this."""


class PayloadTooLargeError(SignalAPIError):
    """The request is larger than the server accepts: send smaller batches."""


class RateLimitError(SignalAPIError):
    """The server asked to slow down, for longer than the client may retry."""


class ServerError(SignalAPIError):
    """The server failed; the request id finds the reason in its logs."""


class SignalConnectionError(SignalAPIError, ConnectionError):
    """The server could not be reached."""


class SignalTimeoutError(SignalAPIError, TimeoutError):
    """There was no answer in time; a future can be waited for again."""


class OperationFailedError(SignalAPIError):
    """The operation failed on the worker."""


class InvalidOperationError(OperationFailedError, ValidationError):
    """The worker found the operation's input wrong."""


class OperationConflictError(OperationFailedError, ConflictError):
    """The state of the run did not allow the operation when its turn came."""


class OperationCancelledError(OperationFailedError):
    """The operation was cancelled."""


_BY_STATUS: dict[int, type[SignalAPIError]] = {
    401: AuthenticationError,
    403: AuthorizationError,
    404: NotFoundError,
    410: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    424: OperationFailedError,
    429: RateLimitError,
    **dict.fromkeys((400, 405, 406, 415, 416, 422), ValidationError),
}
_FAILURES = {422: InvalidOperationError, 409: OperationConflictError}


def from_response(
    status: int, body: Mapping[str, Any] | None, request_id: str | None
) -> SignalAPIError:
    """The exception for an answer that is no success; `body` is the inside of the error shape."""
    default = ServerError if status >= 500 else SignalAPIError
    message = None if body else f"The server answered {status} without an error of Signal's own."
    return _BY_STATUS.get(status, default)(message, status, body, request_id=request_id)


def from_failed_future(
    status: str, error: Mapping[str, Any] | None, request_id: str | None
) -> OperationFailedError:
    """The exception for a future that ended as `failed` or `cancelled`."""
    body = dict(error or {"code": status})
    code = ERROR_STATUS.get(body.get("code", ""))
    kind = _FAILURES.get(code or 0, OperationFailedError)
    if status == "cancelled" or body.get("code") == "cancelled":
        kind = OperationCancelledError
    return kind(None, code, body, request_id=request_id)


def _rebuild(
    kind: type[SignalAPIError],
    message: str,
    status: int | None,
    body: Mapping[str, Any],
    request_id: str | None,
) -> SignalAPIError:
    return kind(message, status, body, request_id=request_id)
