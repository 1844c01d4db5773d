"""A slot may hold the leases of several runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_OPEN = sa.text("released_at IS NULL")


def upgrade() -> None:
    op.drop_index("uq_leases_open_slot", "leases")
    op.create_index(
        "ix_leases_open_slot", "leases", ["slot_id"], sqlite_where=_OPEN, postgresql_where=_OPEN
    )


def downgrade() -> None:
    op.drop_index("ix_leases_open_slot", "leases")
    op.create_index(
        "uq_leases_open_slot",
        "leases",
        ["slot_id"],
        unique=True,
        sqlite_where=_OPEN,
        postgresql_where=_OPEN,
    )
