"""The history of the database's shape, run by alembic through `web.migrate`."""
