"""Records of the journal: what goes in, what comes out. Pure data, no Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("forward_backward", "forward", "optim_step", "sample", "save_state", "complete")
FINISHED = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class NewEntry:
    """An operation to append. `digest` identifies the request for repeats; `tokens` is its size."""

    kind: str
    body: bytes
    tokens: int = 0
    lane: str | None = None
    client_seq: int | None = None
    on_error: str = "fail"
    digest: str = ""


@dataclass(frozen=True)
class Appended:
    """Where an operation went. `seq` is None while it waits for its predecessor in the lane.

    `applied` is the run's last finished seq at that moment.
    """

    entry: int
    seq: int | None
    status: str
    replayed: bool
    submitted_at: float
    applied: int


@dataclass(frozen=True)
class Entry:
    """An operation as the journal knows it; times are epoch seconds."""

    run_id: str
    number: int
    seq: int | None
    kind: str
    status: str
    lane: str | None
    client_seq: int | None
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    tokens: int
    error: dict[str, Any] | None
    result_ref: str
    digest: str

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in FINISHED

    @property
    def has_result(self) -> bool:
        """Whether a result was stored (it may have expired since)."""
        return bool(self.result_ref)

    @classmethod
    def from_redis(cls, run_id: str, number: int, row: Mapping[bytes, bytes]) -> Entry:
        """From the entry's hash."""
        text = {key.decode(): value.decode() for key, value in row.items()}
        return cls(
            run_id=run_id,
            number=number,
            seq=int(text["seq"]) if "seq" in text else None,
            kind=text["kind"],
            status=text["status"],
            lane=text["lane"] or None,
            client_seq=int(text["cseq"]) if text["cseq"] else None,
            submitted_at=float(text["sub"]),
            started_at=float(text["start"]) if "start" in text else None,
            finished_at=float(text["fin"]) if "fin" in text else None,
            tokens=int(text["tok"]),
            error=json.loads(text["err"]) if text.get("err") else None,
            result_ref=text.get("res", ""),
            digest=text["digest"],
        )


@dataclass(frozen=True)
class Head:
    """What the journal says of a run as a whole."""

    run_id: str
    generation: str
    owner: str
    epoch: int
    entries: int
    seq_count: int
    applied: int
    closed: str
    close_error: dict[str, Any] | None
    worker: str
    worker_state: str
    device: dict[str, Any] | None
    state: dict[str, Any]
    last_activity: float
    running: int | None

    @classmethod
    def from_redis(cls, run_id: str, row: Mapping[bytes, bytes], seq_count: int) -> Head:
        """From the head's hash and the length of the order."""
        text = {key.decode(): value.decode() for key, value in row.items()}
        return cls(
            run_id=run_id,
            generation=text["gen"],
            owner=text["owner"],
            epoch=int(text["epoch"]),
            entries=int(text["entries"]),
            seq_count=seq_count,
            applied=int(text["applied"]),
            closed=text["closed"],
            close_error=json.loads(text["close_err"]) if text["close_err"] else None,
            worker=text["worker"],
            worker_state=text["worker_state"],
            device=json.loads(text["device"]) if text["device"] else None,
            state=json.loads(text["state"]),
            last_activity=float(text["activity"]),
            running=int(text["running"]) if text.get("running") else None,
        )


@dataclass(frozen=True)
class Taken:
    """The entry that a worker is to execute now."""

    run_id: str
    number: int
    seq: int
    kind: str
    body: bytes
    submitted_at: float
    started_at: float
    tokens: int
    doomed_by: int | None


@dataclass(frozen=True)
class Outcome:
    """How an operation ended, ready to be committed.

    `data` goes to the projector (metrics, artifact); `state` is the session's state after it;
    `close_status` ends the run with this commit.
    """

    status: str
    result: bytes = b""
    error: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    close_status: str = ""
