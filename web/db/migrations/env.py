"""What alembic runs: the connection comes from `web.migrate`, which holds the lock."""

from __future__ import annotations

from alembic import context

from web.db.metadata import METADATA

connection = context.config.attributes["connection"]
# SQLite cannot alter most of a table: a batch makes a new one and moves the rows.
context.configure(
    connection=connection, target_metadata=METADATA, render_as_batch=True, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
