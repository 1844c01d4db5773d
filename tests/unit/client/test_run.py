"""What the calls of a run send, in which order, and what they make of the answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

import rewardsignal as rs
from rewardsignal import _run, _submit
from tests.unit.client.wire import RUN, TIMINGS, Journal, Wire, refusal, reply, sent

PATH = f"/runs/{RUN['run_id']}"
BATCH = [{"text": "a"}]
FUTURE = {"future_id": "fut_1", "run_id": RUN["run_id"], "seq": 1, "status": "pending"}


def made(*answers: Any) -> tuple[Wire, rs.SignalRun]:
    """A run and its wire, past the request that found it."""
    wire = Wire(reply(RUN), *answers)
    run = wire.client().run(str(RUN["run_id"]))
    wire.requests.clear()
    return wire, run


@pytest.mark.parametrize(
    ("call", "path", "body"),
    [
        (
            lambda run: run.forward_backward(BATCH),
            "forward_backward",
            {"batch_data": BATCH, "loss_fn": "causal_lm"},
        ),
        (
            lambda run: run.forward_backward(
                iter(BATCH), "cross_entropy", accumulate=False, beta=0.1
            ),
            "forward_backward",
            {
                "batch_data": BATCH,
                "loss_fn": "cross_entropy",
                "accumulate": False,
                "loss_kwargs": {"beta": 0.1},
            },
        ),
        (
            lambda run: run.forward(BATCH, top_k=3),
            "forward",
            {"batch_data": BATCH, "top_k": 3, "prompt_logprobs": False},
        ),
        (lambda run: run.optim_step(), "optim_step", {}),
        (
            lambda run: run.optim_step(1e-4, beta1=0.8, weight_decay=None),
            "optim_step",
            {"learning_rate": 1e-4, "beta1": 0.8},
        ),
        (
            lambda run: run.sample("Hi", max_tokens=3, stop=[]),
            "sample",
            {"prompts": ["Hi"], "max_tokens": 3, "stop": []},
        ),
        (lambda run: run.sample([[1, 2]], n=2), "sample", {"prompts": [[1, 2]], "n": 2}),
        (lambda run: run.save_state(), "save_state", {"mode": "adapter"}),
        (lambda run: run.save_state("a"), "save_state", {"name": "a", "mode": "adapter"}),
        (lambda run: run.tokenize("a"), "tokenize", {"text": "a", "add_special_tokens": True}),
        (
            lambda run: run.detokenize([1, 2]),
            "detokenize",
            {"token_ids": [1, 2], "skip_special_tokens": True},
        ),
        (
            lambda run: run.apply_chat_template([{"role": "user", "content": "a"}]),
            "apply_chat_template",
            {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False},
        ),
        (lambda run: run.log({"reward": 1.0}), "metrics", {"metrics": {"reward": 1.0}}),
        (
            lambda run: run.log({"reward": 1.0}, step=0),
            "metrics",
            {"metrics": {"reward": 1.0}, "step": 0},
        ),
        (lambda run: run.complete(), "complete", {"save": True}),
        (lambda run: run.complete(save=False), "complete", {"save": False}),
        (lambda run: run.cancel(), "cancel", {}),
        (lambda run: run.load_state("a"), "load_state", {"artifact": "a", "optimizer": True}),
        (
            lambda run: run.load_state("a", run_id="run_1", optimizer=False),
            "load_state",
            {"artifact": "a", "run_id": "run_1", "optimizer": False},
        ),
        (lambda run: run.pause(), "pause", {}),
        (lambda run: run.resume(), "resume", {}),
        (lambda run: run.resume("rebuilt"), "resume", {"accept": "rebuilt"}),
        (lambda run: run.migrate(), "migrate", {}),
    ],
)
def test_bodies(call: Callable[[rs.SignalRun], Any], path: str, body: dict[str, Any]) -> None:
    wire, run = made(reply({"seq": 1, "timings": TIMINGS}))
    call(run)
    assert [request.url.path for request in wire.requests] == [f"{PATH}/{path}"]
    assert sent(wire.requests[0]) == body


def test_blocking_form_is_one_request() -> None:
    wire, run = made(reply({"seq": 1, "loss": 2.5, "timings": TIMINGS}))
    result = run.forward_backward(BATCH)
    assert (result.loss, result["loss"]) == (2.5, 2.5)
    assert len(wire.requests) == 1


def test_blocking_form_goes_on_as_a_future() -> None:
    future = {**FUTURE, "kind": "optim_step"}
    done = {**future, "status": "completed", "result": {"seq": 1, "step": 4}}
    wire, run = made(reply(future, 202), reply(done))
    assert run.optim_step().step == 4
    assert wire.requests[1].url.path == "/futures/fut_1"


def test_complete_goes_on_as_a_future() -> None:
    future = {**FUTURE, "kind": "complete"}
    result = {"seq": 9, "step": 4, "artifact": "final"}
    _, run = made(reply(future, 202), reply({**future, "status": "completed", "result": result}))
    closed = run.complete()
    assert (closed.status, closed.artifact, closed.current_step) == ("completed", "final", 4)


def test_failed_operation_of_a_blocking_call() -> None:
    _, run = made(refusal(409, "no_gradients", headers={"Signal-Future-Id": "fut_1"}))
    with pytest.raises(rs.OperationConflictError):
        run.optim_step()


def test_refused_operation_of_a_blocking_call() -> None:
    detail = {"param": "batch_data.0.text", "code": "validation_error", "message": "Empty."}
    _, run = made(refusal(422, "validation_error", param="batch_data.0.text", details=[detail]))
    with pytest.raises(rs.ValidationError) as caught:
        run.forward_backward([{"text": ""}])
    assert not isinstance(caught.value, rs.OperationFailedError)
    assert caught.value.details == [detail]


def test_series_is_read_to_its_end() -> None:
    row = {"seq": 1, "step": 1, "source": "run", "metrics": {"loss": 1.0}}
    first = {"run_id": RUN["run_id"], "step": 2, "metrics": [row], "has_more": True}
    wire, run = made(reply({**first, "next_cursor": "c1"}), reply({**first, "has_more": False}))
    assert [one.metrics["loss"] for one in run.metrics().metrics] == [1.0, 1.0]
    assert wire.requests[1].url.params["cursor"] == "c1"


def test_journal_is_read_by_one_long_poll() -> None:
    wire, run = made(reply({"data": [], "has_more": False, "next_seq": 4, "applied_seq": 4}))
    assert run.operations(after_seq=4, wait=20).applied_seq == 4
    assert dict(wire.requests[0].url.params) == {"after_seq": "4", "limit": "100", "wait": "20"}
    assert wire.requests[0].extensions["timeout"]["read"] == 80


def test_list_of_runs_fetches_pages_as_needed() -> None:
    page = {"data": [RUN, RUN], "has_more": True, "next_cursor": "c1"}
    wire = Wire(reply(page), reply({"data": [RUN], "has_more": False, "next_cursor": None}))
    with wire.client() as client:
        listed = client.list_runs(label="team=a", page_size=2)
        assert wire.requests == []
        assert repr(listed) == "<PagedList of 0 so far>"
        assert listed
        assert listed[0].run_id == listed[1].run_id == RUN["run_id"]
        assert len(wire.requests) == 1
        assert [run.run_id for run in listed] == [RUN["run_id"]] * 3
        assert (len(listed), len(listed[1:]), listed[-1]) == (3, 2, listed[2])
        assert len(list(listed)) == 3
        assert len(wire.requests) == 2
        with pytest.raises(IndexError):
            listed[3]
    assert dict(wire.requests[0].url.params) == {"label": "team=a", "limit": "2"}
    assert wire.requests[1].url.params["cursor"] == "c1"


def test_leaving_the_block_well_completes() -> None:
    wire, run = made(reply({"status": "completed"}))
    with run:
        pass
    assert [request.url.path for request in wire.requests] == [f"{PATH}/complete"]


@pytest.mark.parametrize("answer", [reply(RUN), refusal(409, "run_closed"), refusal(500, "x")])
def test_an_exception_pauses_the_run_and_is_what_is_seen(answer: Any) -> None:
    wire, run = made(answer)
    with pytest.raises(RuntimeError, match="mine"), run:
        raise RuntimeError("mine")
    assert [request.url.path for request in wire.requests] == [f"{PATH}/pause"]


def test_an_exception_does_not_wait_long_for_a_server_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_run, "PAUSE_S", 0.3)
    wire, run = made(httpx2.ConnectError("away"))
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert len(wire.requests) > 1
    assert wire.requests[0].extensions["timeout"]["read"] == 0.3


def test_a_branch_is_a_run_of_its_own() -> None:
    other = {**RUN, "run_id": "run_b", "parent": {"run_id": RUN["run_id"], "seq": 4}}
    wire, run = made(reply(other, 201))
    found = run.branch(4, name="b", labels={"a": "b"}, learning_rate=1e-3)
    assert found.run_id == "run_b"
    assert found.info.parent is not None and found.info.parent.seq == 4
    assert sent(wire.requests[0]) == {
        "at_seq": 4,
        "name": "b",
        "labels": {"a": "b"},
        "learning_rate": 1e-3,
    }
    assert wire.requests[0].url.path == f"{PATH}/branch"
    run.branch()
    assert sent(wire.requests[1]) == {}


def test_a_run_begins_from_a_saved_state() -> None:
    wire = Wire(reply(RUN, 201))
    with wire.client() as client:
        client.create_run("tiny", init_from={"run_id": "run_1", "artifact": "a"}, lora_r=4)
    assert sent(wire.requests[0])["init_from"] == {"run_id": "run_1", "artifact": "a"}


def test_a_certificate_at_once_and_as_a_future() -> None:
    found = {"seq": 3, "sha256": "aa", "gradients": None}
    wire, run = made(reply(found))
    assert run.certificate().sha256 == "aa"
    assert wire.requests[0].method == "GET"
    future = {**FUTURE, "kind": "certificate"}
    _, run = made(reply(future, 202), reply({**future, "status": "completed", "result": found}))
    assert run.certificate().sha256 == "aa"


def test_a_replay_is_waited_for_where_it_is_done() -> None:
    future = {**FUTURE, "kind": "certificate", "run_id": "run_replay"}
    done = {**future, "status": "completed", "result": {"seq": 1, "sha256": "aa"}}
    wire, run = made(reply(future, 202), reply(done))
    replay = run.replay()
    assert replay.run_id == "run_replay"
    assert replay.result(5).sha256 == "aa"
    assert wire.requests[0].url.path == f"{PATH}/replay"


@pytest.mark.parametrize("answer", [httpx2.Response(204), refusal(404, "not_found")])
def test_deleting_a_run(answer: Any) -> None:
    wire, run = made(answer)
    run.delete()
    assert [(r.method, r.url.path) for r in wire.requests] == [("DELETE", PATH)]


def page(*ids: int, ended: bool = False) -> Any:
    data = [{"id": id_, "type": "ready", "at": "now", "data": {}} for id_ in ids]
    return reply({"data": data, "has_more": False, "next_after": ids[-1], "ended": ended})


def test_watching_follows_the_events_to_the_end() -> None:
    wire, run = made(page(4, 7), page(9, ended=True))
    assert [event.id for event in run.watch(after=2)] == [4, 7, 9]
    assert [request.url.params["after"] for request in wire.requests] == ["2", "7"]
    assert wire.requests[0].url.params["wait"] == "20.0"


def test_a_run_that_was_cancelled_inside_the_block() -> None:
    _, run = made(refusal(409, "run_closed"), reply({**RUN, "status": "cancelled"}))
    with run:
        pass
    assert run.info.status == "cancelled"


def test_a_run_that_failed_does_not_end_quietly() -> None:
    _, run = made(refusal(409, "run_closed"), reply({**RUN, "status": "failed"}))
    with pytest.raises(rs.ConflictError), run:
        pass


def test_submissions_keep_their_order_and_their_keys() -> None:
    journal = Journal()
    with journal.client() as client:
        run = client.run(str(RUN["run_id"]))
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(run.optim_step_async) for _ in range(40)]
        assert sorted(future.result().seq or 0 for future in futures) == list(range(1, 41))
    assert len(set(journal.keys)) == len(journal.keys) == 40


def test_pipeline_sends_together() -> None:
    journal = Journal()
    with journal.client() as client:
        run = client.run(str(RUN["run_id"]))
        with run.pipeline() as pipe:
            pairs = [(pipe.forward_backward(BATCH), pipe.optim_step(1e-3)) for _ in range(3)]
            assert journal.futures == []
        assert [future["kind"] for future in journal.futures] == [
            "forward_backward",
            "optim_step",
        ] * 3
        assert len(journal.keys) == 1
        journal.finish(6)
        assert [step.result(5).seq for _, step in pairs] == [2, 4, 6]


def test_pipeline_sends_when_it_is_full() -> None:
    journal = Journal()
    with journal.client() as client, client.run(str(RUN["run_id"])).pipeline(4) as pipe:
        for _ in range(9):
            pipe.optim_step()
        assert len(journal.futures) == 8
    assert len(journal.futures) == 9


def test_asking_a_held_back_future_sends_it() -> None:
    journal = Journal()
    with journal.client() as client, client.run(str(RUN["run_id"])).pipeline() as pipe:
        future = pipe.optim_step()
        assert not future.done()
        journal.finish()
        assert future.result(5).seq == 1


def test_pipeline_that_breaks_sends_nothing_more() -> None:
    journal = Journal()
    with journal.client() as client:
        run = client.run(str(RUN["run_id"]))
        pipe = run.pipeline()
        future = pipe.optim_step()
        with pytest.raises(RuntimeError, match="mine"), pipe:
            raise RuntimeError("mine")
        assert journal.futures == []
        with pytest.raises(rs.ConflictError, match="before it was sent"):
            future.result()


def test_what_the_server_refuses_is_told_by_every_future() -> None:
    _, run = made(refusal(422, "validation_error", param="operations.1.learning_rate"))
    pipe = run.pipeline()
    futures = [pipe.optim_step(), pipe.optim_step(-1.0)]
    with pytest.raises(rs.ValidationError):
        pipe.flush()
    for future in futures:
        with pytest.raises(rs.ValidationError, match=r"operations\.1\.learning_rate"):
            future.result()


def test_many_operations_are_cut_to_the_servers_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_submit, "MAX_BYTES", 1000)
    journal = Journal()
    with journal.client() as client:
        run = client.run(str(RUN["run_id"]))
        large = {"kind": "forward_backward", "batch_data": [{"text": "x" * 600}]}
        run.submit([large, large, *({"kind": "optim_step"} for _ in range(300))])
    assert len(journal.keys) == 2 + 7
    assert [future["kind"] for future in journal.futures][:3] == [
        "forward_backward",
        "forward_backward",
        "optim_step",
    ]
