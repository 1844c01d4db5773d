"""Every failure has one shape and a code of the table."""

from __future__ import annotations

import errno
import io
import json
import logging

import pytest
import sqlalchemy.exc
from flask import Flask
from flask.testing import FlaskClient
from kombu.exceptions import OperationalError as BrokerError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from werkzeug.exceptions import ImATeapot, NotFound

from schemas.errors import SignalError
from schemas.service import ErrorEnvelope
from web.errors import as_signal_error, error_answer, flatten, validation_error
from workers.storage import StorageAway

JSON = {"Content-Type": "application/json"}


def test_nested_messages_become_dotted_paths() -> None:
    messages = {
        "batch_data": {0: {"tokens": {3: ["bad"]}}, 2: {"_schema": ["two formats"]}},
        "loss_fn": ["one", "two"],
        "_schema": ["all of it"],
    }
    assert [(d.param, d.message) for d in flatten(messages)] == [
        ("batch_data.0.tokens.3", "bad"),
        ("batch_data.2", "two formats"),
        ("loss_fn", "one"),
        ("loss_fn", "two"),
        (None, "all of it"),
    ]


def test_a_message_may_carry_a_code_of_its_own() -> None:
    class Coded(str):
        code = "not_supported"

    error = validation_error({"optimizer": [Coded("not yet")]})
    assert (error.code, error.param, error.details[0].code) == (
        "not_supported", "optimizer", "not_supported",
    )  # fmt: skip
    mixed = validation_error({"optimizer": [Coded("not yet")], "lora_r": ["no"]})
    assert mixed.code == "validation_error"


def test_many_wrong_fields_are_named_up_to_a_bound() -> None:
    error = validation_error({"batch_data": {i: ["bad"] for i in range(1000)}})
    assert len(error.details) == 100
    assert error.message.startswith("1000 fields are wrong")


def test_facts_for_a_program_are_shown(app: Flask) -> None:
    with app.test_request_context():
        answer = error_answer(SignalError("queue_full", data={"queued": 7}))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    error = json.loads(answer.data)["error"]
    assert error["data"] == {"queued": 7}
    assert not ErrorEnvelope().validate({"error": error})


def test_storage_that_is_away_is_no_defect_of_ours() -> None:
    assert as_signal_error(StorageAway("the bucket")).code == "unavailable"


def _operational(text: str) -> sqlalchemy.exc.OperationalError:
    return sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception(text))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RedisConnectionError("refused"), "unavailable"),
        (RedisTimeoutError("slow"), "unavailable"),
        (ResponseError("MISCONF Errors writing to the AOF file: No space left"), "storage_full"),
        (ResponseError("ERR wrong number of arguments"), "internal_error"),
        (ResponseError("LOADING Redis is loading the dataset in memory"), "unavailable"),
        (_operational("database is locked"), "unavailable"),
        (_operational("database or disk is full"), "storage_full"),
        (sqlalchemy.exc.IntegrityError("INSERT", {}, Exception("unique")), "internal_error"),
        (sqlalchemy.exc.TimeoutError("pool"), "unavailable"),
        (BrokerError("refused"), "unavailable"),
        (OSError(errno.ENOSPC, "full"), "storage_full"),
        (OSError(errno.EACCES, "no"), "internal_error"),
        (NotFound(), "not_found"),
        (ImATeapot(), "bad_request"),
        (ValueError("a secret"), "internal_error"),
        (SignalError("run_closed"), "run_closed"),
    ],
)
def test_every_failure_has_a_code_of_the_table(error: Exception, code: str) -> None:
    assert as_signal_error(error).code == code


def _check_shape(answer: object, code: str, status: int) -> dict[str, object]:
    body = answer.get_json()  # type: ignore[attr-defined]
    assert not ErrorEnvelope(unknown="raise").validate(body)
    assert (body["error"]["code"], answer.status_code) == (code, status)  # type: ignore[attr-defined]
    assert body["error"]["request_id"] == answer.headers["X-Request-Id"]  # type: ignore[attr-defined]
    return dict(body["error"])


def test_unknown_path_and_method(client: FlaskClient) -> None:
    _check_shape(client.get("/no/such"), "not_found", 404)
    answer = client.put("/runs")
    _check_shape(answer, "method_not_allowed", 405)
    assert {"GET", "POST"} <= set(answer.headers["Allow"].split(", "))


@pytest.mark.parametrize(
    ("body", "headers", "code", "status"),
    [
        (b"{", JSON, "malformed_json", 400),
        (b'{"a": "\xe9"}', JSON, "malformed_json", 400),
        (b'{"base_model": "\\ud800"}', JSON, "malformed_json", 400),
        (b"[" * 900, JSON, "malformed_json", 400),
        (b'{"a": ' + b"9" * 900 + b"}", JSON, "validation_error", 422),
        (b"{}", {"Content-Type": "text/plain"}, "unsupported_media_type", 415),
        (b"{}", {}, "unsupported_media_type", 415),
        (b"{}", {**JSON, "Content-Encoding": "gzip"}, "unsupported_media_type", 415),
        (b"x" * 1001, JSON, "payload_too_large", 413),
        (b"[]", JSON, "validation_error", 422),
        (b"null", JSON, "validation_error", 422),
    ],
)
def test_bad_bodies(
    client: FlaskClient, body: bytes, headers: dict[str, str], code: str, status: int
) -> None:
    _check_shape(client.post("/runs", data=body, headers=headers), code, status)


def test_a_chunked_body_over_the_limit_is_refused_and_not_cut(client: FlaskClient) -> None:
    body = b'{"base_model": "' + b"x" * 5000 + b'"}'
    stream = io.BytesIO(body)
    answer = client.post(
        "/runs",
        input_stream=stream,
        headers=JSON,
        environ_overrides={"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
    )
    _check_shape(answer, "payload_too_large", 413)
    assert not stream.read(), "the rest is read away"


def test_all_wrong_fields_are_named_at_once(client: FlaskClient) -> None:
    answer = client.post("/runs", json={"lora_r": 1.5, "labels": {"a": 1}, "zzz": 1})
    error = _check_shape(answer, "validation_error", 422)
    assert {d["param"] for d in error["details"]} == {"base_model", "lora_r", "labels.a", "zzz"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_named(client: FlaskClient, number: str) -> None:
    body = f'{{"base_model": "tiny", "learning_rate": {number}}}'
    answer = client.post("/runs", data=body, headers=JSON)
    assert _check_shape(answer, "validation_error", 422)["param"] == "learning_rate"


@pytest.mark.parametrize("name", ["unlisted", "../tiny", "/etc", "tiny/../tiny", "hub/model"])
def test_a_model_is_a_name(client: FlaskClient, name: str) -> None:
    error = _check_shape(client.post("/runs", json={"base_model": name}), "unknown_model", 422)
    assert error["param"] == "base_model"
    assert error["details"][0]["param"] == "base_model"  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adam"),
        ("lora_dropout", 0.6),
        ("lora_rank_pattern", {"up": 4}),
        ("total_steps", 5),
        ("warmup_steps", 5),
        ("gpu_config", "H100:1"),
        ("max_seq_length", 257),
        ("lora_target_modules", ["q_proj", "nope"]),
        ("lora_r", -1),
        ("learning_rate", -1),
        ("name", "a\x00b"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: FlaskClient, field: str, value: object
) -> None:
    answer = client.post("/runs", json={"base_model": "tiny", field: value})
    assert answer.status_code == 422
    assert answer.get_json()["error"]["param"].split(".")[0] == field


def test_a_query_parameter_that_would_be_ignored_is_refused(client: FlaskClient) -> None:
    for path in ("/models?limit=1", "/runs?limt=1", "/health?x=1"):
        error = _check_shape(client.get(path), "validation_error", 422)
        assert error["param"] in ("limit", "limt", "x")


@pytest.mark.parametrize(
    "path",
    [
        "/runs?cursor=x", "/runs?cursor=1-0123456789abcdef",
        "/runs?limit=0", "/runs?limit=x", "/runs?status=done", "/runs?label=%00", "/futures",
    ],
)  # fmt: skip
def test_bad_queries(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 422
    assert answer.get_json()["error"]["param"] in path + "ids"


@pytest.mark.parametrize(
    "path",
    [
        "/runs/run_0000000000000000", "/runs/x%00y", "/runs/" + "x" * 500, "/futures/fut_x",
        "/futures/fut_0000000000000000_1_00000000_000000000000", "/futures?ids=a,b",
        "/runs/run_0000000000000000/metrics", "/runs/run_0000000000000000/artifacts/a/files/b",
        "/models/..%2f..%2fetc/tokenizer", "/models/other/tokenizer",
    ],
)  # fmt: skip
def test_what_is_not_there_is_404(client: FlaskClient, path: str) -> None:
    _check_shape(client.get(path), "not_found", 404)


def test_an_unexpected_error_says_nothing_and_is_logged_with_its_id(
    app: Flask, api_key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ValueError("a secret")

    monkeypatch.setattr(app.extensions["signal"].catalogue, "entries", broken)
    headers = {"Authorization": f"Bearer {api_key}", "X-Request-Id": "my-own.id:1"}
    with caplog.at_level(logging.ERROR):
        answer = app.test_client().get("/models", headers=headers)
    error = _check_shape(answer, "internal_error", 500)
    assert "secret" not in json.dumps(error)
    assert "my-own.id:1" in caplog.text
    assert "a secret" in caplog.text


def test_a_dead_redis_is_a_503_with_retry_after(client: FlaskClient) -> None:
    for answer in (client.post("/runs", json={"base_model": "tiny"}), client.get("/ready")):
        _check_shape(answer, "unavailable", 503)
        assert int(answer.headers["Retry-After"]) > 0
    assert client.get("/runs").get_json()["data"] == [], "nothing was made"
    assert client.get("/health").status_code == 200


def test_every_answer_carries_id_and_version(client: FlaskClient) -> None:
    for path in ("/health", "/runs", "/no", "/docs", "/openapi.json"):
        answer = client.get(path, headers={"X-Request-Id": "not sane at all"})
        assert answer.headers["X-Request-Id"].startswith("req_")
        assert answer.headers["Signal-Version"]
