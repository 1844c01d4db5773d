"""A run worker's Celery application: `python -P -m celery -A workers.main:app worker …`.

Started by the pool's agent. Importing this is light: the parent process never loads torch.
"""

from __future__ import annotations

from workers.queue.app import make_app
from workers.session.tasks import register
from workers.settings import Settings

settings = Settings.from_env()
app = make_app(settings)
register(app, settings)
