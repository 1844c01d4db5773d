"""A repeated POST gets the first answer."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from flask.testing import FlaskClient

from gpu_pool.database import Database
from schemas.errors import SignalError
from web.accounts.service import create_user
from web.idempotency import service
from web.idempotency.service import Claim, IdempotencyKeys, request_digest
from web.idempotency.tables import IdempotencyRow


@pytest.fixture
def user_id(db: Database) -> str:
    return create_user(db, "ann").id


@pytest.fixture
def keys(db: Database, monkeypatch: pytest.MonkeyPatch) -> IdempotencyKeys:
    monkeypatch.setattr(service, "PATIENCE_S", 0.2)
    return IdempotencyKeys(db)


def test_the_first_answer_is_given_again(keys: IdempotencyKeys, user_id: str) -> None:
    first = keys.claim(user_id, "k", "digest")
    assert first.answer is None
    keys.store(user_id, "k", 201, b'{"a":1}')
    assert keys.claim(user_id, "k", "digest") == Claim(first.token, (201, b'{"a":1}'))


def test_another_request_under_the_key_is_refused(keys: IdempotencyKeys, user_id: str) -> None:
    keys.claim(user_id, "k", "digest")
    with pytest.raises(SignalError) as caught:
        keys.claim(user_id, "k", "other")
    assert caught.value.code == "idempotency_conflict"


def test_keys_belong_to_their_user(db: Database, keys: IdempotencyKeys, user_id: str) -> None:
    keys.claim(user_id, "k", "digest")
    keys.store(user_id, "k", 201, b"{}")
    assert keys.claim(create_user(db, "bob").id, "k", "other").answer is None


def test_a_failed_request_may_be_tried_again(keys: IdempotencyKeys, user_id: str) -> None:
    first = keys.claim(user_id, "k", "digest")
    keys.give_back(user_id, "k")
    second = keys.claim(user_id, "k", "corrected")
    assert second.answer is None
    assert second.token != first.token


def test_what_was_answered_is_not_given_back(keys: IdempotencyKeys, user_id: str) -> None:
    keys.claim(user_id, "k", "digest")
    keys.store(user_id, "k", 200, b"{}")
    keys.give_back(user_id, "k")
    assert keys.claim(user_id, "k", "digest").answer == (200, b"{}")


def test_a_duplicate_waits_a_little_then_is_told_to_come_back(
    keys: IdempotencyKeys, user_id: str
) -> None:
    keys.claim(user_id, "k", "digest")
    with pytest.raises(SignalError) as caught:
        keys.claim(user_id, "k", "digest")
    assert (caught.value.code, caught.value.row.retryable) == ("request_in_progress", True)


def test_a_duplicate_that_waits_gets_the_answer(db: Database, user_id: str) -> None:
    def answer_meanwhile(_: float) -> None:
        IdempotencyKeys(db).store(user_id, "k", 200, b"first")

    keys = IdempotencyKeys(db, sleep=answer_meanwhile)
    keys.claim(user_id, "k", "digest")
    assert keys.claim(user_id, "k", "digest").answer == (200, b"first")


def test_an_abandoned_claim_is_taken_over_with_its_token(
    db: Database, keys: IdempotencyKeys, user_id: str
) -> None:
    first = keys.claim(user_id, "k", "digest")
    _age(db, user_id, service.ABANDONED)
    assert keys.claim(user_id, "k", "digest") == first
    with pytest.raises(SignalError):
        keys.claim(user_id, "k", "digest")


def test_keys_are_forgotten_after_a_day(db: Database, keys: IdempotencyKeys, user_id: str) -> None:
    keys.claim(user_id, "k", "digest")
    keys.store(user_id, "k", 200, b"{}")
    keys.forget_old()
    assert keys.claim(user_id, "k", "digest").answer is not None
    _age(db, user_id, service.KEEP)
    keys.forget_old()
    with db.reading() as session:
        assert session.get(IdempotencyRow, (user_id, "k")) is None


def test_of_many_at_once_one_gets_the_claim(db: Database, user_id: str) -> None:
    got: list[Claim] = []
    keys = IdempotencyKeys(db, sleep=lambda _: time.sleep(0.01))
    gate = threading.Barrier(4)

    def one() -> None:
        gate.wait()
        claim = keys.claim(user_id, "k", "digest")
        if claim.answer is None:
            keys.store(user_id, "k", 200, claim.token.encode())
        got.append(claim)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim.answer is None for claim in got) == 1
    assert len({claim.token for claim in got}) == 1


def test_the_digest_ignores_spelling_and_nothing_else() -> None:
    digest = request_digest("POST", "/runs", {"a": 1, "b": [1, 2]})
    assert digest == request_digest("POST", "/runs", {"b": [1, 2], "a": 1})
    for other in (
        request_digest("POST", "/runs", {"a": 1, "b": [2, 1]}),
        request_digest("POST", "/runs/x", {"a": 1, "b": [1, 2]}),
        request_digest("PUT", "/runs", {"a": 1, "b": [1, 2]}),
    ):
        assert other != digest


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é"])
def test_an_impossible_key_is_named(client: FlaskClient, key: str) -> None:
    answer = client.post("/runs", json={"base_model": "tiny"}, headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert answer.get_json()["error"]["param"] == "Idempotency-Key"


def test_a_failed_creation_leaves_no_claim(client: FlaskClient) -> None:
    db = client.application.extensions["signal"].db
    headers = {"Idempotency-Key": "k"}
    assert client.post("/runs", json={"base_model": "no"}, headers=headers).status_code == 422
    # The Redis of these tests is dead, so this is as far as it gets; the key is free for another body.
    assert client.post("/runs", json={"base_model": "tiny"}, headers=headers).status_code == 503
    with db.reading() as session:
        assert not session.query(IdempotencyRow).count()


def _age(db: Database, user_id: str, by: timedelta) -> None:
    with db.writing() as session:
        row = session.get_one(IdempotencyRow, (user_id, "k"))
        row.claimed_at = row.claimed_at - by - timedelta(seconds=1)


def test_the_answers_about_a_deleted_run_go(
    db: Database, keys: IdempotencyKeys, user_id: str
) -> None:
    made = keys.claim(user_id, "made", "d")
    run_id = f"run_{made.token}"
    keys.claim(user_id, "about", "d", run_id)
    keys.claim(user_id, "other", "d", "run_other")
    for key in ("made", "about", "other"):
        keys.store(user_id, key, 201, b"{}")
    with db.writing() as session:
        service.forget(session, run_id)
    assert keys.claim(user_id, "other", "d").answer is not None
    assert keys.claim(user_id, "made", "d").answer is None
    assert keys.claim(user_id, "about", "d").answer is None
