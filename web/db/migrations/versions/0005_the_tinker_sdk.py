"""Sessions, models, sampling sessions and checkpoints of the Tinker SDK."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.DateTime(timezone=True)
_TABLES = ("tinker_samplers", "tinker_models", "tinker_checkpoints", "tinker_sessions")


def upgrade() -> None:
    op.create_table(
        "tinker_sessions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("user_id", sa.String(length=32), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("seen_at", _TIME, nullable=False),
        sa.Column("parked", sa.Boolean(), nullable=False),
        sa.Column("finished_at", _TIME, nullable=True),
        sa.Column("finish", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_tinker_sessions_user_id_users"),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_sessions"),
        sa.UniqueConstraint("session_id", name="uq_tinker_sessions_session_id"),
    )
    op.create_index("ix_tinker_sessions_seen_at", "tinker_sessions", ["seen_at"], unique=False)
    op.create_index("ix_tinker_sessions_user_id", "tinker_sessions", ["user_id"], unique=False)
    op.create_table(
        "tinker_checkpoints",
        sa.Column("id", _BIG, nullable=False),
        sa.Column("run_id", sa.String(length=32), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("artifact", sa.String(length=100), nullable=False),
        sa.Column("sampler_id", sa.String(length=80), nullable=True),
        sa.Column("user_metadata", sa.JSON(), nullable=True),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("expires_at", _TIME, nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["runs.run_id"], name="fk_tinker_checkpoints_run_id_runs"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_checkpoints"),
        sa.UniqueConstraint("run_id", "seq", name="uq_tinker_checkpoints_run_id_seq"),
    )
    op.create_index(
        "ix_tinker_checkpoints_expires_at", "tinker_checkpoints", ["expires_at"], unique=False
    )
    op.create_index(
        "ix_tinker_checkpoints_run_id_kind_name",
        "tinker_checkpoints",
        ["run_id", "kind", "name"],
        unique=False,
    )
    op.create_table(
        "tinker_models",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.String(length=80), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=True),
        sa.Column("run_id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=True),
        sa.Column("loaded_from", sa.String(length=300), nullable=True),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_tinker_models_run_id_runs"),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["tinker_sessions.session_id"],
            name="fk_tinker_models_session_id_tinker_sessions",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_models"),
        sa.UniqueConstraint("model_id", name="uq_tinker_models_model_id"),
        sa.UniqueConstraint("run_id", name="uq_tinker_models_run_id"),
    )
    op.create_index("ix_tinker_models_session_id", "tinker_models", ["session_id"], unique=False)
    op.create_table(
        "tinker_samplers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sampler_id", sa.String(length=80), nullable=False),
        sa.Column("session_id", sa.String(length=40), nullable=False),
        sa.Column("run_id", sa.String(length=32), nullable=False),
        sa.Column("base_model", sa.String(length=200), nullable=False),
        sa.Column("model_path", sa.String(length=300), nullable=True),
        sa.Column("weights", sa.JSON(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_tinker_samplers_run_id_runs"),
        sa.ForeignKeyConstraint(
            ["session_id"],
            ["tinker_sessions.session_id"],
            name="fk_tinker_samplers_session_id_tinker_sessions",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_tinker_samplers"),
        sa.UniqueConstraint("sampler_id", name="uq_tinker_samplers_sampler_id"),
    )
    op.create_index("ix_tinker_samplers_run_id", "tinker_samplers", ["run_id"], unique=False)
    op.create_index(
        "ix_tinker_samplers_session_id", "tinker_samplers", ["session_id"], unique=False
    )


def downgrade() -> None:
    for name in _TABLES:
        op.drop_table(name)
