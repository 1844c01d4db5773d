"""Users, keys, and who may ask."""

from __future__ import annotations

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select

from gpu_pool.database import Database
from web.accounts import auth_cache, keys, service
from web.accounts.auth_cache import AuthCache
from web.accounts.tables import ApiKeyRow


def test_a_user_is_made_once_and_has_several_keys(db: Database) -> None:
    ann, first = service.create_key(db, "ann")
    again, second = service.create_key(db, "ann")
    assert ann == again
    assert first != second
    assert service.user_of_key(db, first) == service.user_of_key(db, second) == ann
    assert service.create_key(db, "bob")[0] != ann


@pytest.mark.parametrize("name", ["", " ann", "ann\n", "a/b", "x" * 65, "-ann"])
def test_a_bad_user_name_is_refused(db: Database, name: str) -> None:
    with pytest.raises(ValueError, match="not a user name"):
        service.create_user(db, name)


def test_the_key_itself_is_not_stored(db: Database) -> None:
    text = service.create_key(db, "ann")[1]
    with db.reading() as session:
        row = session.scalars(select(ApiKeyRow)).one()
    assert text not in {str(value) for value in vars(row).values()}
    assert row.digest == keys.digest(text)


def test_a_wrong_secret_with_a_known_public_id_opens_nothing(db: Database) -> None:
    text = service.create_key(db, "ann")[1]
    forged = keys.PREFIX + text[len(keys.PREFIX) :][:13] + "0" * 32
    forged += keys._checksum(forged)
    assert keys.public_id(forged) == keys.public_id(text)
    assert service.user_of_key(db, forged) is None


def test_keys_are_listed_without_what_opens_anything(db: Database) -> None:
    texts = [service.create_key(db, name)[1] for name in ("ann", "bob", "ann")]
    ids = [keys.public_id(text) or "" for text in texts]
    service.revoke_key(db, ids[1])
    listed = service.list_keys(db)
    assert sorted((key.id, key.user) for key in listed) == sorted(
        zip(ids, ("ann", "bob", "ann"), strict=True)
    )
    assert [key.id for key in listed if key.revoked_at] == [ids[1]]
    assert [key.created_at for key in listed] == sorted(key.created_at for key in listed)
    assert not any(text.split("-")[3] in repr(listed) for text in texts)


def test_a_revoked_key_opens_nothing(db: Database) -> None:
    text = service.create_key(db, "ann")[1]
    assert service.revoke_key(db, keys.public_id(text) or "")
    assert service.user_of_key(db, text) is None
    assert not service.revoke_key(db, "unknown")


def test_the_cache_remembers_for_seconds(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    ann, text = service.create_key(db, "ann")
    stranger = keys.new_key().text
    asked: list[str] = []
    ask = service.user_of_key
    now = 1000.0

    def counting(db: Database, key: str) -> service.User | None:
        asked.append(key)
        return ask(db, key)

    monkeypatch.setattr("web.accounts.auth_cache.time.monotonic", lambda: now)
    monkeypatch.setattr(service, "user_of_key", counting)
    cache = AuthCache(db)
    for _ in range(3):
        assert cache.user(text) == ann
        assert cache.user(stranger) is None
        assert cache.user("no key at all") is None
    assert asked == [text, stranger]
    now += auth_cache.UNKNOWN_S + 0.1
    cache.user(text)
    cache.user(stranger)
    assert asked == [text, stranger, stranger]
    now += auth_cache.KNOWN_S
    cache.user(text)
    assert asked[-1] == text


def test_the_last_use_is_noted(db: Database) -> None:
    text = service.create_key(db, "ann")[1]
    AuthCache(db).user(text)
    with db.reading() as session:
        assert session.scalars(select(ApiKeyRow.last_used_at)).one() is not None


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer sk-signal-x", "Bearer {typo}"]
)
def test_without_a_right_key_there_is_a_401(
    client: FlaskClient, api_key: str, header: str | None
) -> None:
    client.environ_base.pop("HTTP_AUTHORIZATION")
    typo = api_key[:-1] + ("a" if api_key[-1] != "a" else "b")
    headers = {} if header is None else {"Authorization": header.format(typo=typo)}
    for path in ("/runs", "/models", "/me", "/no/such/path"):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.get_json()["error"]["code"] == "unauthorized"


def test_a_key_tells_whose_it_is(client: FlaskClient, api_key: str) -> None:
    body = client.get("/me").get_json()
    assert (body["object"], body["name"]) == ("user", "ann")
    assert body["user_id"].startswith("user_")
    assert body["key_id"] == api_key.split("-")[2]
    # Also when it is sent with the spaces that the header may have.
    padded = client.get("/me", headers={"Authorization": f"bearer  {api_key} "})
    assert padded.get_json() == body


def test_only_these_paths_answer_without_a_key(client: FlaskClient) -> None:
    client.environ_base.pop("HTTP_AUTHORIZATION")
    open_paths = [
        rule.rule
        for rule in client.application.url_map.iter_rules()
        if "GET" in (rule.methods or ()) and client.get(rule.rule).status_code != 401
    ]
    assert sorted(open_paths) == [
        # Each of its addresses is signed, and another's protocol asks whether the process is alive.
        "/api/v1/external_weights/<run_id>/<artifact>/<int:until>/<mark>/<path:path>",
        "/api/v1/healthz",
        "/docs", "/docs/<name>", "/docs/start.js", "/health", "/openapi.json", "/ready",
    ]  # fmt: skip
