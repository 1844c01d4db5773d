"""The inference client: texts in order, requests of a size, and a cache for what comes out the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from tests.unit.client.test_async import RUN_ID
from tests.unit.client.test_stream import FUTURE, RESULT, Stream, answer, event, token
from tests.unit.client.wire import RUN, Journal, Wire, reply


class Sampler:
    """Answers each sample with the prompts, its first row and how many have been asked for before."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [body for _, body in self.journal.bodies]

    def close(self) -> None:
        self._over.set()
        self._thread.join(5)

    def _work(self) -> None:
        done = 0
        while not self._over.wait(0.002):
            for _, body in self.journal.bodies[done : len(self.journal.futures)]:
                done += 1
                self.journal.answer_with({"samples": self._samples(body, done)})

    def _samples(self, body: dict[str, Any], call: int) -> list[list[dict[str, Any]]]:
        return [
            [{"text": f"{prompt}/{copy}/{call}"} for copy in range(body.get("n", 1))]
            for prompt in body["prompts"]
        ]


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def sampler(journal: Journal) -> Iterator[Sampler]:
    found = Sampler(journal)
    yield found
    found.close()


@pytest.fixture
def run(journal: Journal) -> Iterator[rs.SignalRun]:
    with journal.client() as client:
        yield client.run(RUN_ID)


def test_texts_in_order(run: rs.SignalRun, sampler: Sampler) -> None:
    client = run.inference(timeout=5)
    assert client.sample("a") == ["a/0/1"]
    assert client.sample(["a", "b"], n=2) == ["a/0/2", "a/1/2", "b/0/2", "b/1/2"]
    assert {one["weights"] for one in sampler.asked} == {"live"}


def test_requests_of_a_size_draw_as_one(run: rs.SignalRun, sampler: Sampler) -> None:
    client = run.inference("base", batch_size=2, timeout=5)
    texts = client.batch_sample(list("abcde"), n=3, seed=7)
    assert [text[:3] for text in texts] == [f"{p}/{copy}" for p in "abcde" for copy in range(3)]
    shown = [(one["prompts"], one["first_row"]) for one in sampler.asked]
    assert shown == [(["a", "b"], 0), (["c", "d"], 6), (["e"], 12)]
    client.batch_sample(list("abc"), batch_size=3)
    assert len(sampler.asked) == 4
    with pytest.raises(ValueError, match="batch_size"):
        run.inference(batch_size=0)


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("base", {"temperature": 0.0}),
        ("base", {"seed": 1}),
        ({"artifact": "a"}, {"temperature": 0.0}),
    ],
)
def test_what_comes_out_the_same_is_kept(
    run: rs.SignalRun, sampler: Sampler, weights: Any, options: Any
) -> None:
    client = run.inference(weights, timeout=5)
    client.enable_cache()
    first = client.sample(["a", "b"], **options)
    assert client.sample(["a", "b"], **options) == first
    assert len(sampler.asked) == 1
    assert client.get_cache_stats() == {"enabled": True, "size": 2, "hits": 2, "misses": 2}
    assert client.sample(["a", "b"], max_tokens=9, **options) != first
    client.clear_cache()
    assert client.get_cache_stats() == {"enabled": True, "size": 0, "hits": 0, "misses": 0}
    client.disable_cache()
    assert client.sample(["a", "b"], **options) != first


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("base", {}),
        ("base", {"temperature": 0.7}),
        ("live", {"temperature": 0.0}),
        ("current", {"seed": 1}),
        ("base", {"seed": 1, "n": 2}),
    ],
)
def test_what_may_come_out_differently_is_not(
    run: rs.SignalRun, sampler: Sampler, weights: Any, options: Any
) -> None:
    client = run.inference(weights, timeout=5)
    client.enable_cache()
    assert client.sample("a", **options) != client.sample("a", **options)
    assert client.get_cache_stats()["size"] == 0


def test_only_what_is_missing_is_asked_for(run: rs.SignalRun, sampler: Sampler) -> None:
    client = run.inference("base", timeout=5)
    client.enable_cache()
    client.sample(["b", "d"], temperature=0.0)
    texts = client.sample(list("abcde"), temperature=0.0)
    assert [text[0] for text in texts] == list("abcde")
    assert [one["prompts"] for one in sampler.asked[1:]] == [["a"], ["c"], ["e"]]


def test_with_a_seed_the_place_counts(run: rs.SignalRun, sampler: Sampler) -> None:
    client = run.inference("base", timeout=5)
    client.enable_cache()
    assert client.sample(["a", "a"], seed=1) == ["a/0/1", "a/0/1"]
    assert client.get_cache_stats()["size"] == 2
    client.sample(["b", "a"], seed=1)
    assert [one["first_row"] for one in sampler.asked] == [0, 0]


def test_a_cache_has_an_end(
    run: rs.SignalRun, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewardsignal._inference.MAX_CACHED", 2)
    client = run.inference("base", timeout=5)
    client.enable_cache()
    client.sample(["a", "b", "c"], temperature=0.0)
    assert client.get_cache_stats()["size"] == 2


def test_weights_of_a_step() -> None:
    saved = [{"name": name, "step": step, "files": []} for name, step in (("a", 1), ("b", 2))]
    with Wire(reply(RUN), reply({"data": saved})).client() as client:
        run = client.run(RUN_ID)
        assert run.inference(step=2).weights == {"artifact": "b"}
        with pytest.raises(rs.NotFoundError, match="step 9"):
            run.inference(step=9)


def test_a_text_piece_by_piece() -> None:
    body = Stream(
        event("future", FUTURE), token(1, "On"), token(2, "ce"), event("restart", {}),
        token(1, "On"), token(2, "ce"), token(3, " more"), event("result", RESULT),
    )  # fmt: skip
    with Wire(reply(RUN), answer(body)).client() as client:
        pieces = list(client.inference(RUN_ID).stream_sample("x", max_tokens=3))
    assert pieces == ["On", "ce", " more"]
    assert body.closed


def test_text_helpers() -> None:
    wire = Wire(
        reply(RUN), reply({"token_ids": [[5, 6]]}), reply({"text": "ab"}), reply({"text": "<u>"})
    )
    with wire.client() as client:
        inference = client.inference(RUN_ID)
        assert inference.tokenize("ab") == [5, 6]
        assert inference.detokenize(iter([5, 6])) == "ab"
        assert inference.apply_chat_template([{"role": "user", "content": "u"}]) == "<u>"
        assert repr(inference).startswith("<InferenceClient of <SignalRun")
