"""The entry point for gunicorn: `gunicorn web.wsgi:app`."""

from __future__ import annotations

import sys

from web import create_app

# A short request beside one that is being parsed gets the interpreter back after this, in seconds.
sys.setswitchinterval(0.001)

app = create_app()
