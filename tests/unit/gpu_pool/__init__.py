"""Unit tests of the pool: no sockets, no Redis; SQLite in a temporary folder."""
