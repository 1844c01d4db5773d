"""What a web process takes on at once: order, weights, bounds, and that everything is given back."""

from __future__ import annotations

import io
import json
import threading
import time

import orjson
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from web.admission import SMALL_BYTES, Admission, Gate, end_turn, end_work
from web.parsing import parse

JSON = {"Content-Type": "application/json"}


def test_a_gate_admits_up_to_its_capacity_in_order() -> None:
    gate, order = Gate(10, 5), []
    assert gate.enter(6, 0) and gate.enter(4, 0)
    assert not gate.enter(1, 0), "full"

    def later(weight: int) -> None:
        assert gate.enter(weight, 10)
        order.append(weight)

    threads = []
    for weight in (9, 1):
        threads.append(threading.Thread(target=later, args=(weight,)))
        threads[-1].start()
        while gate.waiting < len(threads):
            time.sleep(0.001)
    gate.leave(4)
    # Four are free: the light one could pass, but it came later.
    assert order == [] and gate.waiting == 2
    gate.leave(6)
    for thread in threads:
        thread.join(10)
    assert sorted(order) == [1, 9]
    gate.leave(9)
    gate.leave(1)
    assert gate.enter(10, 0), "everything was given back"


def test_one_that_is_too_heavy_for_the_gate_passes_alone() -> None:
    gate = Gate(10, 5)
    assert gate.enter(25, 0)
    assert not gate.enter(1, 0)
    gate.leave(25)
    assert gate.enter(1, 0)
    assert not gate.enter(25, 0)


def test_who_gives_up_lets_those_behind_pass() -> None:
    gate = Gate(10, 5)
    assert gate.enter(6, 0)
    behind = threading.Thread(target=lambda: gate.enter(4, 10))
    ahead = threading.Thread(target=lambda: gate.enter(9, 0.2))
    ahead.start()
    while gate.waiting < 1:
        time.sleep(0.001)
    behind.start()
    ahead.join(10)
    behind.join(5)
    assert not behind.is_alive() and gate.waiting == 0


def test_too_many_do_not_wait() -> None:
    gate = Gate(1, 1)
    assert gate.enter(1, 0)
    waiting = threading.Thread(target=lambda: gate.enter(1, 10))
    waiting.start()
    while gate.waiting < 1:
        time.sleep(0.001)
    begun = time.monotonic()
    assert not gate.enter(1, 10)
    assert time.monotonic() - begun < 5
    gate.leave(1)
    waiting.join(10)


@pytest.mark.parametrize("kind", ["turn", "memory"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_busy_process_refuses_by_name_and_reads_the_body_away(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch, kind: str, chunked: bool
) -> None:
    admission = Admission(wait_s=0.0)
    monkeypatch.setattr(app.extensions["signal"], "admission", admission)
    monkeypatch.setitem(app.config, "MAX_CONTENT_LENGTH", 10 * SMALL_BYTES)
    gate, weight = (admission.turns, 1) if kind == "turn" else (admission.bodies, 10 * SMALL_BYTES)
    assert gate.enter(gate.capacity, 0)
    stream = io.BytesIO(json.dumps({"base_model": "x" * 3 * SMALL_BYTES}).encode())
    size = len(stream.getvalue())
    how = {"wsgi.input_terminated": True} if chunked else {"CONTENT_LENGTH": str(size)}
    answer = client.post("/runs", input_stream=stream, headers=JSON, environ_overrides=how)
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"
    assert answer.get_json()["error"]["code"] == "overloaded"
    assert not stream.read()
    # A read needs neither.
    assert client.get("/runs").status_code != 503 or "overloaded" not in client.get("/runs").text
    gate.leave(gate.capacity)
    assert gate.enter(weight, 0)


def test_every_request_gives_back_what_it_took(app: Flask, client: FlaskClient) -> None:
    admission: Admission = app.extensions["signal"].admission
    for body in (b"{}", b"{", b'{"base_model": "tiny", "lora_r": -1}'):
        assert client.post("/runs", data=body, headers=JSON).status_code in (400, 422)
        assert admission.turns.inside == 0 and admission.bodies.inside == 0


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda children: st.lists(children) | st.dictionaries(TEXTS, children),
)


@given(VALUES, st.booleans())
def test_a_large_body_is_read_as_a_small_one(value: object, ascii_only: bool) -> None:
    small = json.dumps(value, ensure_ascii=ascii_only).encode()
    large = small + b" " * SMALL_BYTES
    assert repr(parse(large)) == repr(parse(small))


@pytest.mark.parametrize("text", [b"[NaN]", b"[-Infinity]", b"[1e999]", b"[1" + b"0" * 400 + b"]"])
def test_what_the_fast_reader_refuses_is_read_by_the_other(text: bytes) -> None:
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(text)
    assert repr(parse(text + b" " * SMALL_BYTES)) == repr(parse(text))


def test_who_waits_for_a_result_holds_neither_turn_nor_memory(app: Flask) -> None:
    admission = Admission()
    with app.test_request_context():
        admission.take_body(2 * SMALL_BYTES)
        admission.take_turn()
        assert (admission.bodies.inside, admission.turns.inside) == (2 * SMALL_BYTES, 1)
        end_turn()
        assert (admission.bodies.inside, admission.turns.inside) == (2 * SMALL_BYTES, 0)
        end_work()
        end_work()
        assert (admission.bodies.inside, admission.turns.inside) == (0, 0)
