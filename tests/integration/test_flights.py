"""Samples of sessions in the test's own process, on a real journal: joined, cancelled, broken, abandoned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.support.sessions import CONFIG, Sessions, Together, batch, step
from tests.support.valkey import Valkey, running_valkey, settings_for
from workers.canonical import digest
from workers.engine.generation import Generator
from workers.queue import tokens
from workers.queue.journal import Journal, connect
from workers.queue.records import NewEntry
from workers.session import weights as weights_of
from workers.session.artifacts import FORMAT
from workers.session.session import Session
from workers.storage import LocalStorage, artifact_key
from workers.storage.manifest import read_sealed

RUN, OTHER = "run_0123456789abcdef", "run_00000000000000aa"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with running_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def sessions(valkey: Valkey, tmp_path: Path, tiny_model: Path) -> Iterator[Sessions]:
    redis = connect(valkey.url)
    redis.flushall()
    settings = settings_for(tmp_path, valkey.url, snapshot_share=1e-9)
    journal = Journal(redis, LocalStorage(tmp_path / "store"), settings)
    for run_id in (RUN, OTHER):
        journal.open_run(run_id, "user_1")
    yield Sessions(journal, tiny_model)
    redis.close()


def sample(seed: int = 1, max_tokens: int = 6, **changes: Any) -> NewEntry:
    source = changes.pop("source", "live")
    body = {
        "prompts": [[7, 8, 9, 10]], "max_tokens": max_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "stop_strings": [], "stop_token_ids": [], "seed": seed, "n": 1, "logprobs": True,
        "weights": {"source": source, **changes.pop("saved", {})}, **changes,
    }  # fmt: skip
    return NewEntry("sample", msgpack.packb(body), ordered=source == "live")


def append(sessions: Sessions, *entries: NewEntry, run_id: str = RUN) -> list[int]:
    return [one.entry for one in sessions.journal.append(run_id, entries)[0]]


def status(sessions: Sessions, number: int, run_id: str = RUN) -> str:
    (found,) = sessions.journal.entries(run_id, [number])
    assert found is not None
    return found.status if found.error is None else str(found.error["code"])


def result(sessions: Sessions, number: int, run_id: str = RUN) -> dict[str, Any]:
    (found,) = sessions.journal.entries(run_id, [number])
    assert found is not None
    raw = sessions.journal.result(found)
    assert raw is not None, found.error
    loaded: dict[str, Any] = json.loads(raw)
    return loaded


def drawn(sessions: Sessions, number: int, run_id: str = RUN) -> list[int]:
    ids: list[int] = result(sessions, number, run_id)["samples"][0][0]["token_ids"]
    return ids


def fly(session: Session, steps: int) -> None:
    """Begin what there is, and so many tokens."""
    session.admit_free()
    while session.work(linger=False) is not None:
        pass
    for _ in range(steps):
        session.worker.sampler.step()
        session.settle()


def test_samples_in_a_row_fly_together_and_land_in_order(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    long, short, after, last = append(sessions, sample(1, 9), sample(2, 2), batch(1), sample(3, 2))
    fly(session, 3)
    assert len(session.flights.in_order) == 2, "the sample behind the training waits"
    # The short one has ended, and is committed once those before it are.
    assert [status(sessions, number) for number in (long, short, after)] == [
        "running",
        "running",
        "pending",
    ]
    # Another joins those under way only where nothing is between them.
    session.drain()
    assert {status(sessions, number) for number in (long, short, after, last)} == {"completed"}
    assert [result(sessions, number)["seq"] for number in (long, short, last)] == [1, 2, 4]


def test_one_joins_those_under_way(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    append(sessions, sample(1, 9))
    fly(session, 2)
    (late,) = append(sessions, sample(2, 2))
    fly(session, 2)
    assert len(session.flights.in_order) == 2
    session.drain()
    assert status(sessions, late) == "completed"


def test_one_is_cancelled_and_the_others_fly_on(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    first, second, beside = append(
        sessions, sample(1, 400), sample(2, 5), sample(3, 400, source="base")
    )
    fly(session, 2)
    for number in (first, beside):
        assert sessions.journal.cancel(RUN, number) == "stopping"
    session.drain()
    found = [status(sessions, number) for number in (first, second, beside)]
    assert found == ["cancelled", "completed", "cancelled"]
    # The state that the run shows is not that of an operation which knew nothing of it.
    head = sessions.journal.head(RUN)
    assert head is not None and head.state["step"] == 0


def test_a_broken_batch_fails_what_was_in_it_and_nothing_after(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions.attach(RUN, 1)
    numbers = append(sessions, sample(1, 9), sample(2, 9, source="base"))
    fly(session, 1)

    def broken(self: Generator) -> Any:
        raise RuntimeError("a kernel that is not there")

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "step", broken)
        fly(session, 1)
    assert {status(sessions, number) for number in numbers} == {"operation_failed"}
    again = append(sessions, sample(1, 9), batch(1), step())
    session.drain()
    assert {status(sessions, number) for number in again} == {"completed"}


def test_what_is_abandoned_is_begun_again_and_draws_the_same(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    numbers = append(sessions, sample(1, 8), sample(2, 8), sample(3, 8, source="base"))
    undisturbed = append(
        sessions, sample(1, 8), sample(2, 8), sample(3, 8, source="base"), run_id=OTHER
    )
    fly(session, 4)
    session.close()
    assert not session.flights.busy and not session.worker.sampler.busy
    sessions.attach(RUN, 2).drain()
    sessions.attach(OTHER, 1).drain()
    for number, other in zip(numbers, undisturbed, strict=True):
        assert drawn(sessions, number) == drawn(sessions, other, OTHER)


def test_runs_of_other_ranks_share_a_batch(sessions: Sessions) -> None:
    """Each of them draws what it draws alone, and a training run beside them is not changed."""
    ranks = {RUN: 4, OTHER: 2}
    for run_id, rank in ranks.items():
        session = sessions.attach(run_id, 1, config={**CONFIG, "lora_r": rank})
        append(sessions, batch(1), step(5e-2), run_id=run_id)
        session.drain()
    alone = {}
    for run_id, rank in ranks.items():
        session = sessions.attach(run_id, 2, config={**CONFIG, "lora_r": rank})
        (number,) = append(sessions, sample(5, 30, source="current"), run_id=run_id)
        session.drain()
        alone[run_id] = drawn(sessions, number, run_id)
    together = Together(sessions.journal, sessions.model)
    numbers = {}
    for run_id, rank in ranks.items():
        together.attach(run_id, 3, config={**CONFIG, "lora_r": rank})
        (numbers[run_id],) = append(sessions, sample(5, 30, source="current"), run_id=run_id)
    append(sessions, *(batch(2) for _ in range(4)), step(), run_id=OTHER)
    while together.rota.serve(RUN):
        continue
    for run_id, number in numbers.items():
        assert status(sessions, number, run_id) == "completed"
        assert drawn(sessions, number, run_id) == alone[run_id]
    head = sessions.journal.head(OTHER)
    assert head is not None and head.applied == 7


def test_samples_go_on_while_a_long_operation_stands_still(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = Together(sessions.journal, sessions.model)
    session = together.attach(RUN, 1)
    (first,) = append(sessions, sample(1, 5, source="base"))
    seen = []
    work = session.primitives.execute

    def long(*args: Any) -> Any:
        for _ in range(60):
            together.rota.pause()
        seen.append(status(sessions, first))
        return work(*args)

    monkeypatch.setattr(session.primitives, "execute", long)
    append(sessions, batch(1))
    together.rota.serve(RUN)
    assert seen == ["completed"]


def test_what_has_no_room_waits_in_the_journal_with_a_position(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    sampler = session.worker.sampler
    assert sampler._base is not None
    # Room for one row of a long sample.
    sampler._generator = Generator(
        sampler._base, cache_bytes=40 * sampler._base.decoder.cache_bytes_per_token
    )
    numbers = append(sessions, *(sample(seed, 30, source="base") for seed in range(2)))
    fly(session, 2)
    assert sampler.full
    numbers += append(sessions, *(sample(seed, 30, source="base") for seed in range(2, 5)))
    fly(session, 1)
    waiting = sessions.journal.entries(RUN, numbers[2:])
    places = sessions.journal.positions([one for one in waiting if one is not None])
    assert list(places.values()) == [0, 1, 2]
    session.drain()
    assert {status(sessions, number) for number in numbers} == {"completed"}


def test_a_stream_is_marked_where_it_begins_and_ends(sessions: Sessions) -> None:
    session = sessions.attach(RUN, 1)
    (number,) = append(sessions, sample(1, 5, stream=True))
    session.drain()
    _, rows = tokens.read(sessions.journal.redis, RUN, number, "0", 1)
    assert (rows[0], rows[-1]) == (tokens.BEGIN, tokens.END)
    said = [one["token_id"] for row in rows[1:-1] for one in row if isinstance(one, dict)]
    assert said == drawn(sessions, number)


def test_saved_states_are_read_again_when_others_were_asked_for(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_of, "KEPT", 1)
    session = sessions.attach(RUN, 1)
    saved = []
    for name in ("one", "two"):
        body = msgpack.packb({"name": name, "mode": "adapter"})
        append(sessions, NewEntry("save_state", body), batch(3), step(5e-2))
        session.drain()
        saved.append({"run_id": RUN, "artifact": name, **where(sessions, name)})
    scores = []
    for state in (*saved, saved[0]):
        asked = sample(1, 0, source="saved", saved=state, prompt_logprobs=True)
        (number,) = append(sessions, asked)
        session.drain()
        scores.append(result(sessions, number)["prompt_logprobs"])
    assert scores[0] == scores[2] != scores[1]


def where(sessions: Sessions, name: str) -> dict[str, str]:
    key = artifact_key(RUN, name)
    return {"key": key, "sha256": digest(read_sealed(sessions.journal.storage, key, FORMAT))}


def test_a_saved_state_that_is_damaged_or_gone_is_named(sessions: Sessions, tmp_path: Path) -> None:
    session = sessions.attach(RUN, 1)
    body = msgpack.packb({"name": "one", "mode": "adapter"})
    append(sessions, NewEntry("save_state", body))
    session.drain()
    place = where(sessions, "one")
    file = next((tmp_path / "store").rglob("adapter_model.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for key, code in ((place["key"], "state_mismatch"), (place["key"] + "x", "not_found")):
        saved = {"run_id": RUN, "artifact": "one", **place, "key": key}
        (number,) = append(sessions, sample(1, source="saved", saved=saved))
        session.drain()
        (entry,) = sessions.journal.entries(RUN, [number])
        assert entry is not None and entry.error is not None
        assert (entry.error["code"], entry.error["param"]) == (code, "weights")


@pytest.fixture
def coalesced(valkey: Valkey, tmp_path: Path, tiny_model: Path) -> Iterator[Together]:
    """A worker with one message for many operations, which has the run."""
    redis = connect(valkey.url)
    redis.flushall()
    settings = settings_for(tmp_path, valkey.url, doorbell="coalesced")
    journal = Journal(redis, LocalStorage(tmp_path / "store"), settings)
    journal.open_run(RUN, "user_1")
    together = Together(journal, tiny_model)
    together.attach(RUN, 1)
    yield together
    redis.close()


def test_a_coalesced_bell_is_free_again_when_the_samples_have_ended(coalesced: Together) -> None:
    """Else nobody would ring for what comes next."""
    for source in ("live", "current", "live"):
        rings = coalesced.journal.append(RUN, [sample(1, 5, source=source)])[2]
        assert rings
        while coalesced.rota.serve(RUN):
            continue


def test_a_sample_that_comes_while_the_worker_listens_is_begun(
    coalesced: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody rings for it: the bell is taken as long as the worker listens, and no other message comes."""
    journal, found = coalesced.journal, []
    listen = journal.listen

    def comes_meanwhile(run_id: str, seconds: float) -> bool:
        if not found:
            appended, _, rings = journal.append(RUN, [sample(1, 5, source="current")])
            found.append(appended[0].entry)
            assert not rings
        return listen(run_id, seconds)

    monkeypatch.setattr(journal, "listen", comes_meanwhile)
    journal.append(RUN, [batch(1)])
    while coalesced.rota.serve(RUN):
        continue
    (entry,) = journal.entries(RUN, found)
    assert entry is not None and entry.status == "completed"
    assert journal.append(RUN, [batch(2)])[2], "the bell is free again"
