"""The table of error codes and the exception that carries one."""

from __future__ import annotations

import pickle

import pytest

from schemas.errors import ERRORS, Detail, SignalError, raise_all

RETRIED_BY_CLIENTS = {408, 425, 429, 500, 502, 503, 504}


def test_only_a_retryable_error_has_a_status_that_clients_retry() -> None:
    for row in ERRORS.values():
        assert (row.status in RETRIED_BY_CLIENTS) == row.retryable, row


def test_every_retryable_refusal_says_when_to_come_back() -> None:
    for row in ERRORS.values():
        if row.status in (429, 503):
            assert row.retry_after_s, row


def test_an_error_survives_pickling_and_the_wire() -> None:
    error = SignalError(
        "not_found",
        "No such run.",
        param="run_id",
        details=[Detail("a.0", "unknown_loss", "x")],
        data={"at_seq": 3},
    )
    for copy in (pickle.loads(pickle.dumps(error)), SignalError.from_dict(error.to_dict())):
        assert copy.to_dict() == error.to_dict()
        assert copy.status == 404


def test_a_code_of_a_newer_version_is_still_an_error() -> None:
    assert (
        SignalError.from_dict({"code": "from_the_future", "message": "m"}).code
        == "operation_failed"
    )


def test_raise_all_names_every_field() -> None:
    raise_all([])
    one = Detail("a", "unknown_model", "No such model.")
    with pytest.raises(SignalError) as error:
        raise_all([one])
    assert (error.value.code, error.value.param) == ("unknown_model", "a")
    with pytest.raises(SignalError) as error:
        raise_all([one, Detail("b", "validation_error", "Bad.")])
    assert error.value.code == "validation_error"
    assert [detail.param for detail in error.value.details] == ["a", "b"]
