"""The training client: pairs, epochs, histories, and what a failure leaves."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import rewardsignal as rs
from rewardsignal import _training
from tests.unit.client.test_async import BATCH, RUN_ID
from tests.unit.client.wire import Journal

FORWARD = {"step": 3, "loss": 2.0, "num_tokens": 7, "metrics": {"accuracy": 0.5}}
STEP = {"step": 4, "grad_norm": 0.25, "learning_rate": 1e-3, "metrics": {"clipped": 1.0}}


class Worker:
    """Ends every operation a moment after it has come; the losses fall by one."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.forwards, self.most = journal, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(5)

    def _work(self) -> None:
        while not self._over.wait(0.005):
            pending = [one for one in self.journal.futures if one["status"] == "pending"]
            self.most = max(self.most, len(pending))
            for future in pending[:1]:
                self.journal.answer_with(self._answer(future["kind"]))

    def _answer(self, kind: str) -> dict[str, Any]:
        if kind != "forward_backward":
            return {**STEP, "step": 3 + self.forwards}
        self.forwards += 1
        return {**FORWARD, "loss": 10.0 - self.forwards}


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def training(journal: Journal) -> Iterator[rs.TrainingClient]:
    with journal.client() as client:
        yield client.training(RUN_ID, timeout=5)


@pytest.fixture
def worker(journal: Journal) -> Iterator[Worker]:
    found = Worker(journal)
    yield found
    found.close()


def test_a_batch_is_a_gradient_and_a_step(
    journal: Journal, training: rs.TrainingClient, worker: Worker
) -> None:
    result = training.train_batch(BATCH, "dpo", 1e-4, beta=0.2)
    assert result.to_dict() == {
        "loss": 9.0,
        "grad_norm": 0.25,
        "learning_rate": 1e-3,
        "step": 4,
        "num_tokens": 7,
        "metrics": {"accuracy": 0.5, "clipped": 1.0},
    }
    assert result["loss"] == result.loss
    assert journal.bodies == [
        (
            "forward_backward",
            {"batch_data": BATCH, "loss_fn": "dpo", "loss_kwargs": {"beta": 0.2}},
        ),
        ("optim_step", {"learning_rate": 1e-4}),
    ]


def test_an_epoch(training: rs.TrainingClient, worker: Worker) -> None:
    epoch = training.train_epoch([BATCH] * 12, progress=False)
    assert epoch.num_batches == 12
    assert epoch.avg_loss == sum(10.0 - index for index in range(1, 13)) / 12
    assert (epoch.avg_grad_norm, epoch.final_step) == (0.25, 15)
    assert training.get_metrics() == {
        "loss": [10.0 - index for index in range(1, 13)],
        "grad_norm": [0.25] * 12,
        "learning_rate": [1e-3] * 12,
    }
    assert 2 < worker.most <= 2 * _training.DEPTH


def test_an_epoch_of_nothing(training: rs.TrainingClient) -> None:
    epoch = training.train_epoch(iter(()))
    assert (epoch.num_batches, epoch.final_step) == (0, 3)
    assert math.isnan(epoch.avg_loss)


def test_an_epoch_shows_its_progress(
    training: rs.TrainingClient,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training.train_epoch([BATCH])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    training.train_epoch([BATCH])
    shown = capsys.readouterr().err
    assert "1/1" in shown
    assert "loss=8.0000" in shown


def test_a_failure_is_raised_once_nothing_is_under_way(
    journal: Journal, training: rs.TrainingClient
) -> None:
    def fail() -> None:
        while len(journal.futures) < 2 * _training.DEPTH:
            threading.Event().wait(0.01)
        journal.finish(code="non_finite", message="Not a number.")
        journal.finish(code="predecessor_failed", message="Half a batch.")
        threading.Event().wait(0.1)
        journal.finish(6)

    thread = threading.Thread(target=fail)
    thread.start()
    with pytest.raises(rs.InvalidOperationError, match="Not a number"):
        training.train_epoch([BATCH] * 20, progress=False)
    assert len(journal.futures) == 2 * _training.DEPTH
    assert {one["status"] for one in journal.futures} == {"failed", "completed"}
    thread.join(5)


def test_a_wait_that_runs_out_of_time(journal: Journal) -> None:
    with journal.client() as client, pytest.raises(rs.SignalTimeoutError):
        client.training(RUN_ID, timeout=0.05).train_batch(BATCH)


def test_its_other_calls(journal: Journal, training: rs.TrainingClient, worker: Worker) -> None:
    with training as same:
        assert same is training
        assert same.forward_backward(BATCH).loss == 9.0
        assert same.optim_step(1e-2, grad_clip_norm=1.0).grad_norm == 0.25
        assert same.save_checkpoint("mine", "state").seq == 3
    assert [body for _, body in journal.bodies][1:] == [
        {"learning_rate": 1e-2, "grad_clip_norm": 1.0},
        {"name": "mine", "mode": "state"},
    ]
    assert training.get_metrics()["loss"] == [9.0]
    assert repr(training).startswith("<TrainingClient of <SignalRun run_0123456789abcdef")


def test_the_history_has_an_end(
    training: rs.TrainingClient, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_training, "HISTORY", 3)
    short = rs.TrainingClient(training.run)
    for _ in range(5):
        short.train_batch(BATCH)
    assert short.get_metrics()["loss"] == [7.0, 6.0, 5.0]
