"""`signal runs`, `models` and `checkpoints`: what is asked, and what is printed of the answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.unit.client.cli import CREATED, LISTED, SHOWN, Runner
from tests.unit.client.wire import RUN, TIMINGS, refusal, reply, sent

RUN_ID = str(RUN["run_id"])
MODEL = {"name": "tiny", "architecture": "Llama", "num_parameters": 1234567,
         "context_length": 512, "has_chat_template": True}  # fmt: skip
LOST = {"id": 3, "type": "worker_lost", "at": "2026-01-02T03:04:05.000Z",
        "data": {"why": "killed", "running_seq": None, "more": {}}}  # fmt: skip


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are told in the reader's zone."""
    monkeypatch.setattr(
        "rewardsignal._cli.following.local_time", lambda at: at.replace("T", " ")[:19]
    )


def events(*found: Any, ended: bool = True) -> httpx2.Response:
    return reply({"data": list(found), "has_more": False, "next_after": 3, "ended": ended})


def operation(seq: int, at: str, **fields: Any) -> dict[str, Any]:
    return {
        "seq": seq, "future_id": f"fut_{seq}", "kind": "forward_backward", "status": "completed",
        "tokens": 1200, "submitted_at": CREATED, "started_at": f"2026-01-02T03:04:{at}.000Z",
        "finished_at": f"2026-01-02T03:04:{at}.250Z", "error": None, **fields,
    }  # fmt: skip


def operations(*found: Any) -> httpx2.Response:
    return reply({"data": list(found), "has_more": False, "next_seq": 9, "applied_seq": 9})


def metrics(**losses: float) -> httpx2.Response:
    rows = [{"seq": int(seq[1:]), "metrics": {"loss": loss}} for seq, loss in losses.items()]
    return reply({"metrics": rows, "has_more": False})


def test_list(signal: Runner) -> None:
    answer = reply({"data": [LISTED], "has_more": False, "next_cursor": None})
    output = signal("runs", "list", answers=[answer]).output
    assert output.splitlines()[0].split() == ["RUN", "NAME", "MODEL", "STATUS", "STEP", "CREATED"]
    assert RUN_ID in output
    assert "\x1b" not in output


def test_list_ends_at_its_limit(signal: Runner) -> None:
    answer = reply({"data": [LISTED, LISTED], "has_more": True, "next_cursor": "c"})
    result = signal("runs", "list", "--limit", "3", "--json", answers=[answer])
    assert len(json.loads(result.output)) == 3


def test_show(signal: Runner) -> None:
    hold = {"reason": "mismatch", "info": {}, "accept": "rebuilt"}
    shown = {**SHOWN, "hold": hold, "parent": {"run_id": "run_2", "seq": 7, "artifact": None},
             "branchable": {"from": 0, "to": 3}, "labels": {"a": "b"}}  # fmt: skip
    saved = {"name": "final", "size_bytes": 12345, "files": []}
    result = signal("runs", "show", "run_1", answers=[reply(shown), reply({"data": [saved]})])
    facts = dict(line.split("  ", 1) for line in result.output.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["config lora_r"] == "8"
    assert facts["checkpoint final"] == "12.3 kB"
    assert facts["held"] == "mismatch; resume --accept rebuilt"
    assert facts["parent"] == "run_2 after operation 7"
    assert facts["branchable"] == "operations 0 to 3"
    assert facts["label a"] == "b"
    assert "error" not in facts


def test_show_json(signal: Runner) -> None:
    result = signal("runs", "show", "run_1", "--json", answers=[reply(SHOWN), reply({"data": []})])
    assert json.loads(result.output)["run_id"] == RUN_ID


def test_watch(signal: Runner) -> None:
    output = signal("runs", "watch", "run_1", answers=[reply(SHOWN), events(LOST)]).output
    assert output == "2026-01-02 03:04:05         worker lost       why killed\n"
    result = signal("runs", "watch", "run_1", "--json", answers=[reply(SHOWN), events(LOST)])
    assert json.loads(result.output) == LOST


def test_logs_are_in_the_order_of_time(signal: Runner) -> None:
    failed = {"status": "failed", "error": {"code": "non_finite", "message": "Not finite."}}
    answers = [
        reply(SHOWN),
        metrics(s1=2.5, s2=2.25),
        operations(operation(1, "04"), operation(2, "06", **failed)),
        events(LOST),
    ]
    lines = signal("runs", "logs", "run_1", answers=answers).output.splitlines()
    assert lines == [
        "2026-01-02 03:04:04      1  forward_backward  loss 2.5, 1,200 tokens, 0.25 s",
        "2026-01-02 03:04:05         worker lost       why killed",
        "2026-01-02 03:04:06      2  forward_backward  loss 2.25, 1,200 tokens, 0.25 s, "
        "failed: Not finite. [non_finite]",
    ]


def test_logs_after_a_seq_have_no_events_from_before(signal: Runner) -> None:
    answers = [reply(SHOWN), metrics(s2=2.0), operations(operation(2, "06")), events(LOST)]
    result = signal("runs", "logs", "run_1", "--after-seq", "1", "--json", answers=answers)
    found = [json.loads(line) for line in result.output.splitlines()]
    assert [(one["operation"]["seq"], one["operation"]["metrics"]) for one in found] == [
        (2, {"loss": 2.0})
    ]


def test_followed_logs_take_the_numbers_of_results(signal: Runner) -> None:
    future = {
        "future_id": "fut_2", "run_id": RUN_ID, "kind": "forward_backward", "status": "completed",
        "seq": 2, "error": None,
        "result": {"seq": 2, "step": 1, "loss": 1.5, "loss_sum": 9.0, "num_tokens": 6,
                   "grad_norm": 0.5, "metrics": {"input_tokens": 7.0}, "timings": TIMINGS},
    }  # fmt: skip
    answers = [
        reply(SHOWN), metrics(s1=2.5), operations(operation(1, "04")), events(ended=False),
        operations(operation(2, "06")), reply(future), events(LOST),
        operations(operation(3, "07")), refusal(410, "future_expired"),
    ]  # fmt: skip
    result = signal("runs", "logs", "run_1", "-f", "--json", answers=answers)
    found = [json.loads(line) for line in result.output.splitlines()]
    assert [next(iter(one)) for one in found] == ["operation", "event", "operation", "operation"]
    assert found[2]["operation"]["metrics"] == {"loss": 1.5, "grad_norm": 0.5, "input_tokens": 7.0}
    assert found[3]["operation"]["metrics"] == {}


def test_pause_and_resume(signal: Runner) -> None:
    paused = reply({**SHOWN, "status": "paused"})
    assert signal("runs", "pause", "run_1", answers=[reply(SHOWN), paused]).output == (
        f"{RUN_ID}: paused at step 3\n"
    )
    answers = [reply(SHOWN), reply(SHOWN)]
    result = signal("runs", "resume", "run_1", "--accept", "rebuilt", "--json", answers=answers)
    assert json.loads(result.output)["status"] == "ready"
    assert sent(signal.wire.requests[1]) == {"accept": "rebuilt"}


@pytest.mark.parametrize("command", ["cancel", "delete"])
def test_what_cannot_be_undone_is_asked_for(signal: Runner, command: str) -> None:
    result = signal("runs", command, "run_1", answers=[reply(SHOWN)])
    assert result.exit_code == 2
    assert "--yes" in result.stderr
    assert [request.method for request in signal.wire.requests] == ["GET"]


def test_cancel_and_delete(signal: Runner) -> None:
    closed = {"success": True, "run_id": RUN_ID, "status": "cancelled", "current_step": 3}
    answers = [reply(SHOWN), reply(closed)]
    assert signal("runs", "cancel", "run_1", "--yes", answers=answers).output == (
        f"{RUN_ID}: cancelled at step 3\n"
    )
    answers = [reply(SHOWN), httpx2.Response(204)]
    result = signal("runs", "delete", RUN_ID, "-y", "--json", answers=answers)
    assert json.loads(result.output) == {"run_id": RUN_ID, "deleted": True}
    assert signal.asked[-1] == f"DELETE /runs/{RUN_ID}"


def test_branch_prints_the_id_alone(signal: Runner) -> None:
    arguments = ("--at-seq", "0", "--name", "fork", "--label", "a=b=c", "--learning-rate", "1e-5")
    fork = reply({**SHOWN, "run_id": "run_2"}, 201)
    result = signal("runs", "branch", "run_1", *arguments, answers=[reply(SHOWN), fork])
    assert result.output == "run_2\n"
    body = {"at_seq": 0, "name": "fork", "labels": {"a": "b=c"}, "learning_rate": 1e-5}
    assert sent(signal.wire.requests[1]) == body
    assert signal("runs", "branch", "run_1", "--label", "a").exit_code == 2


def test_certificate(signal: Runner) -> None:
    found = {"seq": 4, "state_seq": 3, "step": 1, "sha256": "ab", "weights": "cd", "moments": "ef",
             "gradients": None, "fingerprint": {}}  # fmt: skip
    output = signal("runs", "certificate", "run_1", answers=[reply(SHOWN), reply(found)]).output
    assert output.split()[:2] == ["sha256", "ab"]
    assert "gradients" not in output


def test_models(signal: Runner) -> None:
    answer = reply({"models": ["tiny"], "data": [MODEL]})
    assert "1,234,567" in signal("models", answers=[answer]).output
    assert json.loads(signal("models", "--json", answers=[answer]).output)[0]["name"] == "tiny"


def test_checkpoints(signal: Runner, tmp_path: Path) -> None:
    content = b"weights"
    file = {"path": "adapter.bin", "size_bytes": len(content), "url": "/x",
            "sha256": hashlib.sha256(content).hexdigest()}  # fmt: skip
    saved = {"name": "final", "mode": "adapter", "step": 3, "seq": 7, "size_bytes": 7,
             "created_at": CREATED, "files": [file]}  # fmt: skip
    listed = reply({"data": [saved]})
    output = signal("checkpoints", "list", "run_1", answers=[reply(SHOWN), listed]).output
    assert output.splitlines()[1].split()[:6] == ["final", "adapter", "3", "7", "7", "bytes"]
    answers = [reply(SHOWN), listed, httpx2.Response(200, content=content), listed]
    folder = str(tmp_path / "out")
    result = signal("checkpoints", "download", "run_1", "final", folder, answers=answers)
    assert result.output == f"{folder}: 1 files, 7 bytes\n"
    assert (tmp_path / "out" / "adapter.bin").read_bytes() == content
    missing = signal("checkpoints", "download", "run_1", "other", folder,
                     answers=[reply(SHOWN), listed])  # fmt: skip
    assert missing.exit_code == 4
