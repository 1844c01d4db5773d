"""How far each projection has come."""

from __future__ import annotations

from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from gpu_pool.database import Base


class ProjectionRow(Base):
    """A reader's position in its stream, written in the transaction that holds what it read."""

    __tablename__ = "projections"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    position: Mapped[str] = mapped_column(String(64))
