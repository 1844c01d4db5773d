"""What the tables of this protocol hold of a run, deleted with it."""

from __future__ import annotations

from sqlalchemy import delete
from sqlalchemy.orm import Session

from web.tinker.tables import CheckpointRow, ModelRow, SamplerRow


def forget(session: Session, run_id: str) -> None:
    """Delete what names the run."""
    for table in (CheckpointRow, SamplerRow, ModelRow):
        session.execute(delete(table).where(table.run_id == run_id))
