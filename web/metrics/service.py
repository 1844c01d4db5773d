"""The series of a run in SQL. No Flask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from gpu_pool.database import Database
from web.metrics.tables import MetricRow


@dataclass(frozen=True)
class Projected:
    """What an operation measured, on its way into SQL."""

    run_id: str
    seq: int
    step: int
    kind: str
    numbers: Mapping[str, float]
    at: datetime

    def row(self) -> dict[str, Any]:
        """The columns."""
        return {
            "run_id": self.run_id,
            "seq": self.seq,
            "step": self.step,
            "source": "run",
            "kind": self.kind,
            "numbers": dict(self.numbers),
            "token": None,
            "created_at": self.at,
        }


def page(db: Database, run_id: str, after: int | None, limit: int) -> tuple[list[MetricRow], bool]:
    """Rows in the order in which they were recorded; and whether more follow."""
    query = select(MetricRow).where(MetricRow.run_id == run_id, MetricRow.id > (after or 0))
    with db.reading() as session:
        rows = list(session.scalars(query.order_by(MetricRow.id).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def add_own(
    db: Database, run_id: str, step: int, numbers: Mapping[str, float], token: str
) -> MetricRow:
    """Record numbers of the user's own; a repeat with the same token gets the first row."""
    with db.writing() as session:
        row = session.scalar(select(MetricRow).where(MetricRow.token == token))
        if row is None:
            row = MetricRow(
                run_id=run_id,
                seq=None,
                step=step,
                source="user",
                kind=None,
                numbers=dict(numbers),
                token=token,
                created_at=datetime.now(UTC),
            )
            session.add(row)
        return row


def add_projected(session: Session, events: Sequence[Projected]) -> None:
    """Record what operations measured, by one statement: rows of the ORM one by one cost a
    millisecond each. The projector comes to a seq once (`runs.projected_seq`)."""
    if events:
        session.execute(insert(MetricRow), [event.row() for event in events])


def forget_after(session: Session, run_id: str, seq: int) -> None:
    """Delete what operations after `seq` measured; the user's own numbers stay."""
    session.execute(delete(MetricRow).where(MetricRow.run_id == run_id, MetricRow.seq > seq))


def forget(session: Session, run_id: str) -> None:
    """Delete a run's series."""
    session.execute(delete(MetricRow).where(MetricRow.run_id == run_id))
