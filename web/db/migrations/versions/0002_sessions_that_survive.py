"""Events of runs, where a run began, its last certificate, the run of an idempotent answer, deletions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "run_events",
        sa.Column("id", _BIG, nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.Column("stream_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_run_events_run_runs"),
        sa.PrimaryKeyConstraint("id", name="pk_run_events"),
        sa.UniqueConstraint("stream_id", name="uq_run_events_stream_id"),
    )
    op.create_index("ix_run_events_run_id", "run_events", ["run", "id"], unique=False)

    op.create_table(
        "erasures",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
    )

    op.add_column("runs", sa.Column("parent", sa.String(length=32), nullable=True))
    op.add_column("runs", sa.Column("origin", sa.JSON(), nullable=True))
    op.add_column("runs", sa.Column("certificate", sa.JSON(), nullable=True))
    op.create_index("ix_runs_parent", "runs", ["parent"], unique=False)

    op.add_column("idempotency_keys", sa.Column("run_id", sa.String(length=32), nullable=True))
    op.create_index("ix_idempotency_keys_run_id", "idempotency_keys", ["run_id"], unique=False)

    with op.batch_alter_table("artifacts") as batch:
        batch.drop_constraint("uq_artifacts_run_id_seq", type_="unique")


def downgrade() -> None:
    with op.batch_alter_table("artifacts") as batch:
        batch.create_unique_constraint("uq_artifacts_run_id_seq", ["run_id", "seq"])
    op.drop_index("ix_idempotency_keys_run_id", "idempotency_keys")
    op.drop_column("idempotency_keys", "run_id")
    op.drop_index("ix_runs_parent", "runs")
    for name in ("certificate", "origin", "parent"):
        op.drop_column("runs", name)
    op.drop_table("erasures")
    op.drop_table("run_events")
