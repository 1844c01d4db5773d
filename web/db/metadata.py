"""Every table of the server, for the migrations."""

from __future__ import annotations

import gpu_pool.tables
import web.accounts.tables
import web.artifacts.tables
import web.db.tables
import web.events.tables
import web.idempotency.tables
import web.metrics.tables
import web.runs.tables
import web.tinker.tables
from gpu_pool.database import Base

MODULES = (
    gpu_pool.tables,
    web.accounts.tables,
    web.artifacts.tables,
    web.db.tables,
    web.events.tables,
    web.idempotency.tables,
    web.metrics.tables,
    web.runs.tables,
    web.tinker.tables,
)
METADATA = Base.metadata
