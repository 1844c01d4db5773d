"""How `signal status` and `signal doctor` speak."""

from __future__ import annotations

from tests.support.tiny import make_tiny_model
from web.stack import doctor
from web.stack.doctor import Finding
from web.stack.status import as_text

RUNNING = {
    "running": True,
    "supervised": False,
    "data_dir": "/data",
    "base_url": "http://127.0.0.1:8000",
    "processes": [{"name": "web", "pid": 7, "alive": False, "restarts": 2}],
    "devices": [
        {
            "name": "cpu0",
            "device": "CPU",
            "threads": 1,
            "state": "leased",
            "runs": [{"run_id": "run_1"}, {"run_id": "run_2"}],
        },
        {"name": "cpu1", "device": "CPU", "threads": 1, "state": "free", "runs": []},
    ],
    "queued": [],
    "runs": [
        {
            "run_id": "run_1",
            "worker_state": "ready",
            "hold": None,
            "sharing_with": 1,
            "journal": {
                "entries": 9,
                "waiting": 2,
                "unsealed": 4,
                "redis_bytes": 2_500_000,
                "redis_bytes_bound": 10**9,
            },
            "queue": {"name": "run.run_1", "length": 1},
        }
    ],
    "redis_error": "gone",
}


def test_status_for_people():
    assert as_text(RUNNING).splitlines() == [
        "http://127.0.0.1:8000, data in /data",
        "The supervisor is gone: nothing is restarted. `signal up` takes over, `signal down` stops all.",
        "Processes:",
        "  web        pid 7, dead, restarted 2 times",
        "Devices:",
        "  cpu0       CPU, 1 threads, leased by run_1, run_2",
        "  cpu1       CPU, 1 threads, free",
        "Runs:",
        "  run_1  ready beside 1 other, 2 waiting, 4 of 9 in Redis with 2.5 of at most 1000 MB, 1 doorbells",
        "Waiting for a device:",
        "  none",
        "gone",
    ]


def test_nothing_runs():
    assert as_text({"running": False, "data_dir": "/d"}) == (
        "Nothing runs on /d (start it with `signal up`)."
    )


def test_a_finding_says_how_to_mend_it():
    assert str(Finding("ok", "cpu", "2 cores")) == "ok       cpu: 2 cores"
    assert (
        str(Finding("error", "disk", "full", "free some")).splitlines()[1].strip() == "-> free some"
    )


def test_doctor_names_what_a_model_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = doctor._model("tiny", tmp_path)
    assert found.level == "error"
    assert str(tmp_path) in found.message
    assert "--model tiny=" in found.mend
    model = make_tiny_model(tmp_path / "whole")
    assert doctor._model("tiny", model).level == "ok"
