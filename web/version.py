"""The server's version, as every answer carries it in `Signal-Version`."""

from __future__ import annotations

VERSION = "0.1.0"
