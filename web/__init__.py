"""The Flask tier: REST over the journal and SQL. One folder per domain.

`create_app` builds the application; nothing connects before the first request, so it may be made
before a server forks. Never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from workers.settings import Settings


def create_app(settings: Settings | None = None) -> Flask:
    """The application; `settings` default to those of the environment."""
    # Imported here: `web.accounts.service` and `web.migrate` are used without Flask.
    from web.application import build

    return build(settings)
