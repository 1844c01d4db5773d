"""`signal sample` and `signal chat`: from which weights, what is shown, what is taken back."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from rewardsignal._cli import sampling
from tests.unit.client.cli import SHOWN, Runner
from tests.unit.client.wire import RUN, TIMINGS, refusal, reply, sent

RUN_ID = str(RUN["run_id"])
STAND_IN = "run_fedcba9876543210"
CLOSED = {**SHOWN, "status": "completed"}


def result(*texts: str) -> dict[str, Any]:
    samples = [{"text": text, "token_ids": [1], "finish_reason": "stop"} for text in texts]
    return {"seq": None, "samples": [samples], "prompt_token_ids": [[1]], "timings": TIMINGS}


def stream(*events: tuple[str, dict[str, Any]], text: str) -> httpx2.Response:
    """The answer of sample/stream."""
    future = {"future_id": "fut_1", "run_id": RUN_ID, "kind": "sample", "seq": None,
              "status": "pending"}  # fmt: skip
    told = [("future", future), *events, ("result", result(text))]
    lines = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in told)
    return httpx2.Response(200, content=lines, headers={"Content-Type": "text/event-stream"})


def token(text: str | None) -> tuple[str, dict[str, Any]]:
    return "token", {"prompt": 0, "sample": 0, "token_id": 1, "logprob": -0.5, "text": text}


RESTART: tuple[str, dict[str, Any]] = ("restart", {})


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed goes to one."""
    monkeypatch.setattr(sampling, "on_terminal", lambda: True)


def test_the_text_is_printed(signal: Runner) -> None:
    answers = [reply(SHOWN), stream(token("Hel"), token(None), token("lo"), text="Hello")]
    found = signal("sample", "run_1", "Say", "--max-tokens", "5", "--stop", "x", answers=answers)
    assert found.output == "Hello\n"
    body = {"prompts": ["Say"], "max_tokens": 5, "stop": ["x"], "weights": "current"}
    assert sent(signal.wire.requests[1]) == body


def test_off_a_terminal_nothing_is_printed_that_is_taken_back(signal: Runner) -> None:
    answers = [reply(SHOWN), stream(token("Nev"), RESTART, token("Hello"), text="Hello")]
    found = signal("sample", "run_1", "Say", answers=answers)
    assert found.stdout == "Hello\n"


def test_on_a_terminal_a_lost_worker_is_told(signal: Runner, terminal: None) -> None:
    answers = [reply(SHOWN), stream(token("Nev"), RESTART, token("He"), text="Hello")]
    found = signal("sample", "run_1", "Say", answers=answers)
    assert found.stdout == "Nev\nHello\n"
    assert "worker was lost" in found.stderr


def test_on_a_terminal_a_sample_controls_nothing(signal: Runner, terminal: None) -> None:
    answers = [reply(SHOWN), stream(token("a\x1b[2J\tb\n"), text="a\x1b[2J\tb\n")]
    assert signal("sample", "run_1", "Say", answers=answers).stdout == "a�[2J\tb\n\n"


def test_chat_messages_and_standard_input(signal: Runner) -> None:
    answers = [reply(SHOWN), stream(text="Ahoy")]
    options = ("--chat", "--system", "Be brief.")
    signal("sample", "run_1", "-", *options, answers=answers, input="Hello?")
    assert sent(signal.wire.requests[1])["prompts"] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    ]
    assert signal("sample", "run_1", "x", "--system", "y").exit_code == 2


def test_several_samples_and_json(signal: Runner) -> None:
    answers = [reply(SHOWN), reply(result("one", "two"))]
    output = signal("sample", "run_1", "Say", "--n", "2", answers=answers).output
    assert output == "--- 1 of 2 (stop)\none\n--- 2 of 2 (stop)\ntwo\n"
    found = signal("sample", "run_1", "Say", "--json", answers=[reply(SHOWN), reply(result("one"))])
    assert json.loads(found.output)["samples"][0][0]["text"] == "one"


@pytest.mark.parametrize(
    ("lora_r", "arguments", "weights"),
    [(8, [], "current"), (0, [], "live"), (8, ["--weights", "base"], "base"),
     (8, ["--weights", "live"], "live"), (8, ["--weights", "mine"], {"artifact": "mine"})],
)  # fmt: skip
def test_weights_of_an_open_run(
    signal: Runner, lora_r: int, arguments: list[str], weights: Any
) -> None:
    run = {**SHOWN, "config": {"lora_r": lora_r}}
    signal("sample", "run_1", "Say", *arguments, answers=[reply(run), stream(text="x")])
    assert sent(signal.wire.requests[1])["weights"] == weights


def test_an_ended_run_is_sampled_by_one_of_the_moment(signal: Runner) -> None:
    saved = reply({"data": [{"name": "early"}, {"name": "final"}]})
    made = reply({**SHOWN, "run_id": STAND_IN}, 201)
    answers = [reply(CLOSED), saved, made, stream(text="Hello"), httpx2.Response(204)]
    found = signal("sample", "run_1", "Say", answers=answers)
    assert found.stdout == "Hello\n"
    assert "final" in found.stderr
    sampled = sent(signal.wire.requests[3])
    assert sampled["weights"] == {"run_id": RUN_ID, "artifact": "final"}
    assert signal.asked[-1] == f"DELETE /runs/{STAND_IN}"


def test_the_run_of_the_moment_is_deleted_after_an_error(signal: Runner) -> None:
    saved = reply({"data": [{"name": "early"}, {"name": "final"}]})
    made = reply({**SHOWN, "run_id": STAND_IN}, 201)
    answers = [reply(CLOSED), saved, made, refusal(422, "sequence_too_long"), httpx2.Response(204)]
    found = signal("sample", "run_1", "Say", "--weights", "early", answers=answers)
    assert found.exit_code == 1
    assert signal.asked[-1] == f"DELETE /runs/{STAND_IN}"


@pytest.mark.parametrize("arguments", [[], ["--weights", "other"]])
def test_an_ended_run_without_that_checkpoint(signal: Runner, arguments: list[str]) -> None:
    names = [{"name": "final"}] if arguments else []
    answers = [reply(CLOSED), reply({"data": names})]
    found = signal("sample", "run_1", "Say", *arguments, answers=answers)
    assert found.exit_code == 1
    assert "signal runs branch" in found.stderr


def test_chat_keeps_the_conversation(signal: Runner) -> None:
    answers = [reply(SHOWN), stream(text="Ahoy"), stream(text="Blue"), stream(text="Red")]
    found = signal(
        "chat", "run_1", "--system", "Be brief.", answers=answers,
        input="Hello\n\nWhat colour?\n/reset\nAnd now?\n/exit\nnever sent\n",
    )  # fmt: skip
    assert found.stdout == "Ahoy\nBlue\nRed\n"
    turns = [sent(request)["prompts"][0] for request in signal.wire.requests[1:]]
    assert [[message["content"] for message in one] for one in turns] == [
        ["Be brief.", "Hello"],
        ["Be brief.", "Hello", "Ahoy", "What colour?"],
        ["Be brief.", "And now?"],
    ]


def test_chat_json(signal: Runner) -> None:
    answers = [reply(SHOWN), stream(token("Ah"), RESTART, token("Ahoy"), text="Ahoy")]
    found = signal("chat", "run_1", "--json", answers=answers, input="Hello\n")
    assert json.loads(found.stdout) == {
        "role": "assistant", "content": "Ahoy", "finish_reason": "stop",
    }  # fmt: skip
