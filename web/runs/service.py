"""Runs in SQL: making one, reading, listing, ending. No Flask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from gpu_pool import leases, of_run
from gpu_pool.database import Database
from schemas.errors import Detail, SignalError, raise_all
from schemas.run_config import UNEMBEDDING, chosen_targets
from schemas.runs import CLOSED_STATUSES, resolved
from web.accounts.tables import UserRow
from web.runs.facts import NO_RUN
from web.runs.tables import RunLabelRow, RunRow
from workers.capabilities import missing
from workers.catalogue import Catalogue, ModelEntry
from workers.footprint import footprints
from workers.queue.journal import Journal
from workers.settings import Settings


@dataclass(frozen=True)
class Filters:
    """What a list of runs is narrowed to."""

    status: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Draft:
    """A run to be made. `origin` is what its worker begins from, None for nothing."""

    run_id: str
    user_id: str
    base_model: str
    config: dict[str, Any]
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    origin: dict[str, Any] | None = None


class Runs:
    """The runs of a server."""

    def __init__(
        self, settings: Settings, db: Database, journal: Journal, catalogue: Catalogue
    ) -> None:
        """Touches SQL, the journal, and the catalogue of models."""
        self.settings, self.db, self.journal, self.catalogue = settings, db, journal, catalogue

    def create(self, draft: Draft) -> None:
        """Make a run and queue it for a device; a repeat with the same id changes nothing.

        Raises SignalError run_limit.
        """
        with self.db.writing() as session:
            if session.scalar(select(RunRow.id).where(RunRow.run_id == draft.run_id)) is not None:
                return
            self._check_limit(session, draft.user_id)
            _insert(session, draft)
            leases.request(session, draft.run_id, self._requirements(draft))
            session.flush()
            # Inside the transaction: a run in SQL always has a journal, and a journal whose run was
            # never committed is not known to anybody.
            self.journal.open_run(draft.run_id, draft.user_id)

    def config(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request for a run comes to. Raises SignalError: unknown_model, sequence_too_long."""
        model = self.catalogue.entry(request["base_model"])
        config = resolved(dict(request), model.context_length)
        if config["max_seq_length"] > model.context_length:
            raise SignalError(
                "sequence_too_long",
                f"max_seq_length is {config['max_seq_length']:,}; the context of {model.name} is "
                f"{model.context_length:,} tokens.",
                param="max_seq_length",
            )
        raise_all((*_absent_layers(model, config), *missing(config)))
        return config

    def _requirements(self, draft: Draft) -> dict[str, Any]:
        """What the agent hands on to the run's worker, and where it may put it."""
        config = draft.config
        return {
            "base_model": draft.base_model,
            "config": config,
            "owner": draft.user_id,
            "origin": draft.origin,
            "shares": self._shares(draft),
            "dedicated": bool(config.get("dedicated")) or not config["lora_r"],
        }

    def _shares(self, draft: Draft) -> dict[str, Any]:
        try:
            return footprints(self.catalogue.entry(draft.base_model), draft.config)
        except SignalError:
            # A model that is gone since the run's parent was made: its worker will say so.
            return {}

    def _check_limit(self, session: Session, user_id: str) -> None:
        # The lock makes the count and the insert one step on PostgreSQL; SQLite has one writer anyway.
        session.execute(select(UserRow.id).where(UserRow.id == user_id).with_for_update())
        active = session.scalars(
            select(RunRow.run_id).where(
                RunRow.user_id == user_id, RunRow.status.not_in(CLOSED_STATUSES)
            )
        ).all()
        if len(active) < self.settings.max_active_runs:
            return
        # SQL may lag behind the journal: only runs that the journal still has open count.
        heads = self.journal.heads(active)
        if sum(head is not None and not head.closed for head in heads) >= len(active):
            raise SignalError(
                "run_limit",
                f"You have {len(active)} unfinished runs, and this server allows "
                f"{self.settings.max_active_runs}; complete or cancel one.",
            )

    def get(self, run_id: str) -> RunRow:
        """A run whose ownership was checked before. Raises SignalError not_found once it is deleted."""
        with self.db.reading() as session:
            found = session.scalar(select(RunRow).where(RunRow.run_id == run_id))
        if found is None:
            raise SignalError("not_found", NO_RUN)
        return found

    def queue_positions(self, run_ids: Sequence[str]) -> dict[str, int | None]:
        """For each run, how many wait for a device before it; None when it does not wait."""
        with self.db.reading() as session:
            return {run_id: leases.queue_position(session, run_id) for run_id in run_ids}

    def sharing(self, run_ids: Sequence[str]) -> dict[str, int]:
        """For each of these runs that is on a worker, how many others are there."""
        if not run_ids:
            return {}
        with self.db.reading() as session:
            return of_run.neighbours(session, run_ids)

    def page(
        self, user_id: str, filters: Filters, before: int | None, limit: int
    ) -> tuple[list[RunRow], bool]:
        """A user's runs, newest first, those older than the row `before`; and whether more follow."""
        query = _filtered(select(RunRow).where(RunRow.user_id == user_id), filters)
        if before is not None:
            query = query.where(RunRow.id < before)
        with self.db.reading() as session:
            rows = list(session.scalars(query.order_by(RunRow.id.desc()).limit(limit + 1)))
        return rows[:limit], len(rows) > limit

    def note_closed(self, run_id: str, status: str, error: Mapping[str, Any] | None) -> None:
        """Write the end of a run into SQL now; the projector would do the same a moment later."""
        with self.db.writing() as session:
            close_row(session, run_id, status, error, datetime.now(UTC))

    def note_status(self, run_id: str, status: str) -> None:
        """Write how an open run stands into SQL now, for lists; the projector would a moment later."""
        with self.db.writing() as session:
            session.execute(
                update(RunRow)
                .where(RunRow.run_id == run_id, RunRow.status.not_in(CLOSED_STATUSES))
                .values(status=status, updated_at=datetime.now(UTC))
            )

    def children(self, run_id: str) -> list[str]:
        """Open runs that began from this one."""
        mine = select(RunRow.run_id).where(
            RunRow.parent == run_id, RunRow.status.not_in(CLOSED_STATUSES)
        )
        with self.db.reading() as session:
            return list(session.scalars(mine))

    def count_open(self) -> int:
        """Unfinished runs of all users."""
        with self.db.reading() as session:
            open_runs = select(func.count()).where(RunRow.status.not_in(CLOSED_STATUSES))
            return session.scalar(open_runs) or 0


def _insert(session: Session, draft: Draft) -> None:
    now = datetime.now(UTC)
    row = RunRow(
        run_id=draft.run_id,
        user_id=draft.user_id,
        name=draft.name,
        base_model=draft.base_model,
        config=draft.config,
        labels=dict(draft.labels),
        status="queued",
        parent=draft.origin["run_id"] if draft.origin else None,
        origin=draft.origin,
        created_at=now,
        updated_at=now,
    )
    session.add(row)
    session.flush()
    for name, value in draft.labels.items():
        session.add(RunLabelRow(run=row.id, name=name, value=value))


def forget(session: Session, run_id: str) -> None:
    """Delete a run and its labels; what else refers to it must be deleted before."""
    mine = select(RunRow.id).where(RunRow.run_id == run_id).scalar_subquery()
    session.execute(delete(RunLabelRow).where(RunLabelRow.run == mine))
    session.execute(delete(RunRow).where(RunRow.run_id == run_id))


def close_row(
    session: Session, run_id: str, status: str, error: Mapping[str, Any] | None, at: datetime
) -> None:
    """The end of a run in SQL; the first end stands. A run that still waits for a device stops waiting."""
    session.execute(
        update(RunRow)
        .where(RunRow.run_id == run_id, RunRow.status.not_in(CLOSED_STATUSES))
        .values(status=status, error=dict(error) if error else None, ended_at=at, updated_at=at)
    )
    leases.withdraw(session, run_id)


def _filtered(query: Select[RunRow], filters: Filters) -> Select[RunRow]:
    if filters.status is not None:
        query = query.where(RunRow.status == filters.status)
    if filters.label is not None:
        name, equals, value = filters.label.partition("=")
        query = query.join(RunLabelRow, RunLabelRow.run == RunRow.id)
        query = query.where(RunLabelRow.name == name)
        if equals:
            query = query.where(RunLabelRow.value == value)
    return query


def _absent_layers(model: ModelEntry, config: Mapping[str, Any]) -> Iterator[Detail]:
    """What a configuration trains and the model does not have."""
    known = {*model.linear_widths, UNEMBEDDING}
    for index, name in enumerate(config["lora_target_modules"] or ()):
        if name not in known:
            yield Detail(
                f"lora_target_modules.{index}",
                "validation_error",
                f"{model.name} has no layer {name!r}.",
            )
    for setting in ("lora_rank_pattern", "lora_alpha_pattern"):
        for key in config[setting]:
            if key.rpartition(".")[2] not in chosen_targets(config):
                message = f"No layer with an adapter ends in {key!r}."
                yield Detail(f"{setting}.{key}", "validation_error", message)
