"""Records of the journal: what goes in, what comes out. Pure data, no Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = (
    "forward_backward",
    "forward",
    "optim_step",
    "load_state",
    "sample",
    "save_state",
    "certificate",
    "complete",
)
# What a session must execute again when it is rebuilt; the others leave its state as it is.
STATEFUL = ("forward_backward", "optim_step", "load_state")
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
    # Without one it has no seq, waits for nothing in the run, and may be executed beside anything.
    ordered: bool = True
    # JSON of the error that it ends with at once: it takes its place and is never executed.
    refused: str = ""


@dataclass(frozen=True)
class Appended:
    """Where an operation went. `seq` is None while it waits for its predecessor in the lane, and where it has
    no place in the order.

    `applied` is the run's last finished seq at that moment. `tag` makes the future's id one of its own,
    also if a server that lost its newest data gives the entry's number out again.
    """

    entry: int
    seq: int | None
    status: str
    replayed: bool
    submitted_at: float
    applied: int
    tag: str


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
    tag: str
    # Whether it has no place in the order.
    free: bool = False

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
            tag=text["tag"],
            free=text.get("free") == "1",
        )


@dataclass(frozen=True)
class Snapshot:
    """The newest verified snapshot, as the journal knows it; `at` is in epoch seconds.

    `cost_s` is what it took from the run's time, `load_s` how long loading it took or is expected to take.
    """

    seq: int
    key: str
    at: float
    size_bytes: int
    cost_s: float


@dataclass(frozen=True)
class Head:
    """What the journal says of a run as a whole."""

    run_id: str
    owner: str
    epoch: int
    entries: int
    seq_count: int
    base: int
    applied: int
    closed: str
    close_error: dict[str, Any] | None
    worker: str
    worker_state: str
    device: dict[str, Any] | None
    state: dict[str, Any]
    last_activity: float
    running: int | None
    hold: str
    hold_info: dict[str, Any]
    move: str
    rolled: bool
    snapshot: Snapshot | None
    branch_from: int | None
    deterministic_since: int
    fingerprint: dict[str, Any] | None
    queued_bytes: int
    unsealed_bytes: int
    # Of the operations that have no place in the order: how many wait, and how many are executed.
    free: int = 0
    flying: int = 0

    @property
    def busy(self) -> bool:
        """Whether an operation is being executed."""
        return self.running is not None or self.flying > 0

    @property
    def unfinished(self) -> int:
        """Operations that have not ended, but for those that wait for an earlier client_seq of their lane."""
        return self.seq_count - self.applied + self.free + self.flying

    @property
    def waits(self) -> bool:
        """Whether there is an operation that has not ended."""
        return self.unfinished > 0

    @property
    def recovery_s(self) -> float | None:
        """Expected seconds from the loss of the worker to a session that goes on; None before the first."""
        known = self.state.get("recovery_s")
        return None if known is None else float(known)

    @classmethod
    def from_redis(
        cls,
        run_id: str,
        row: Mapping[bytes, bytes],
        order_length: int,
        free: int = 0,
        flying: int = 0,
    ) -> Head:
        """From the head's hash and the length of the order, which begins after `base`."""
        text = {key.decode(): value.decode() for key, value in row.items()}
        branch_from = text.get("branch_from", "")
        return cls(
            run_id=run_id,
            owner=text["owner"],
            epoch=int(text["epoch"]),
            entries=int(text["entries"]),
            seq_count=int(text["base"]) + order_length,
            base=int(text["base"]),
            applied=int(text["applied"]),
            closed=text["closed"],
            close_error=json.loads(text["close_err"]) if text["close_err"] else None,
            worker=text["worker"],
            worker_state=text["worker_state"],
            device=json.loads(text["device"]) if text["device"] else None,
            state=json.loads(text["state"]),
            last_activity=float(text["activity"]),
            running=int(text["running"]) if text.get("running") else None,
            hold=text["hold"],
            hold_info=json.loads(text["hold_info"]) if text["hold_info"] else {},
            move=text["move"],
            rolled=text.get("rolled") == "1",
            snapshot=Snapshot(**json.loads(text["snapshot"])) if text.get("snapshot") else None,
            branch_from=int(branch_from) if branch_from else None,
            deterministic_since=int(text.get("det_since", "0")),
            fingerprint=json.loads(text["fingerprint"]) if text.get("fingerprint") else None,
            queued_bytes=int(text.get("queued_bytes", "0")),
            unsealed_bytes=int(text.get("unsealed", "0")),
            free=free,
            flying=flying,
        )


@dataclass(frozen=True)
class Ahead:
    """What a take would come to: `found` is "entry" (of a `kind`, with its `tokens`), "empty", "held",
    "fenced", "closed" or "missing"."""

    found: str
    kind: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Taken:
    """The entry that a worker is to execute now; `lane` is empty when the client named none.

    `seq` is 0 where it has no place in the order.
    """

    run_id: str
    number: int
    seq: int
    kind: str
    body: bytes
    body_ref: str
    submitted_at: float
    started_at: float
    tokens: int
    doomed_by: int | None
    tag: str
    lane: str
    client_seq: int | None
    digest: str


@dataclass(frozen=True)
class Outcome:
    """How an operation ended, ready to be committed.

    `data` goes to the projector (metrics, artifact); `state` is the session's state after it;
    `record` is what a replay of it is compared with; `close_status` ends the run with this commit.
    """

    status: str
    result: bytes = b""
    error: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    close_status: str = ""


@dataclass(frozen=True)
class Past:
    """A finished entry with all that a replay or a segment needs; times are epoch seconds.

    `result` is inline, or `result_ref` names it in storage; likewise `body` and `body_ref`.
    """

    seq: int
    number: int
    tag: str
    kind: str
    status: str
    submitted_at: float
    started_at: float | None
    finished_at: float
    tokens: int
    lane: str
    client_seq: int | None
    digest: str
    body: bytes
    body_ref: str
    result: bytes
    result_ref: str
    error: dict[str, Any] | None
    record: dict[str, Any]
    doomed_by: int | None = None

    def entry(self, run_id: str) -> Entry:
        """The same as the API shows it."""
        return Entry(
            run_id=run_id,
            number=self.number,
            seq=self.seq,
            kind=self.kind,
            status=self.status,
            lane=self.lane or None,
            client_seq=self.client_seq,
            submitted_at=self.submitted_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
            tokens=self.tokens,
            error=self.error,
            result_ref=self.result_ref or ("inline" if self.result else ""),
            digest=self.digest,
            tag=self.tag,
        )

    def fields(self) -> dict[str, str]:
        """The hash of its entry in Redis."""
        optional = {
            "start": "" if self.started_at is None else f"{self.started_at:.6f}",
            "res": self.result_ref or ("inline" if self.result else ""),
        }
        return {
            "kind": self.kind,
            "status": self.status,
            "sub": f"{self.submitted_at:.6f}",
            "fin": f"{self.finished_at:.6f}",
            "tok": str(self.tokens),
            "body": self.body_ref,
            "on_error": "fail",
            "digest": self.digest,
            "lane": self.lane,
            "cseq": "" if self.client_seq is None else str(self.client_seq),
            "dl": f"{self.finished_at:.6f}",
            "tag": self.tag,
            "size": str(len(self.body)),
            "seq": str(self.seq),
            "err": json.dumps(self.error) if self.error else "",
            "rec": json.dumps(self.record),
        } | {name: value for name, value in optional.items() if value}
