"""The tree of exceptions: which class, what it says, that it survives a process border."""

from __future__ import annotations

import pickle

import pytest

import rewardsignal as rs
from rewardsignal._exceptions import from_failed_future, from_response


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, rs.ValidationError),
        (401, rs.AuthenticationError),
        (403, rs.AuthorizationError),
        (404, rs.NotFoundError),
        (409, rs.ConflictError),
        (410, rs.NotFoundError),
        (413, rs.PayloadTooLargeError),
        (415, rs.ValidationError),
        (418, rs.SignalAPIError),
        (422, rs.ValidationError),
        (424, rs.OperationFailedError),
        (429, rs.RateLimitError),
        (500, rs.ServerError),
        (503, rs.ServerError),
    ],
)
def test_status_decides_the_class(status: int, kind: type[Exception]) -> None:
    error = from_response(status, {"code": "some_code", "message": "Why."}, "req_1")
    assert type(error) is kind
    assert (error.status_code, error.code, error.request_id) == (status, "some_code", "req_1")


def test_text_holds_what_helps() -> None:
    body = {"code": "validation_error", "message": "Too long.", "param": "batch_data.0.text"}
    text = str(from_response(422, body, "req_7"))
    assert text == "Too long. [code=validation_error, param=batch_data.0.text, request_id=req_7]"


def test_answer_of_a_stranger_says_so() -> None:
    assert "502" in str(from_response(502, None, None))


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ("non_finite", (rs.OperationFailedError, rs.ValidationError)),
        ("no_gradients", (rs.OperationFailedError, rs.ConflictError)),
        ("worker_lost", (rs.OperationFailedError,)),
        ("a_code_of_tomorrow", (rs.OperationFailedError,)),
    ],
)
def test_failed_future_is_caught_by_both_names(code: str, kinds: tuple[type, ...]) -> None:
    error = from_failed_future("failed", {"code": code, "message": "Why."}, "req_1")
    assert all(isinstance(error, kind) for kind in kinds)
    assert error.message == "Why."


def test_cancelled_future() -> None:
    assert type(from_failed_future("cancelled", None, None)) is rs.OperationCancelledError


def test_network_errors_are_builtins_too() -> None:
    assert isinstance(rs.SignalConnectionError("x"), ConnectionError)
    assert isinstance(rs.SignalTimeoutError("x"), TimeoutError)


def test_class_docstring_is_the_message() -> None:
    assert str(rs.SignalConnectionError()) == rs.SignalConnectionError.__doc__


def test_pickle_keeps_everything() -> None:
    body = {"code": "run_closed", "message": "Why.", "param": "x", "retryable": True}
    body["details"] = [{"param": "x", "code": "c", "message": "m"}]
    error = pickle.loads(pickle.dumps(from_response(409, body, "req_1")))
    assert type(error) is rs.ConflictError
    assert (error.status_code, error.param, error.request_id) == (409, "x", "req_1")
    assert error.retryable
    assert error.details == body["details"]
