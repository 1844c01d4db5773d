"""The environment of the stack's processes: the user's, less what would lead Python or a server astray.

Pure, but for reading os.environ where it is told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

# Marks every process of a stack and all that they start, so that `down` finds them whatever was killed.
MARK = "SIGNAL_STACK_OF"
# Servers read options of their own from the environment; a user's are meant for other servers.
_FOREIGN_PREFIXES = ("CELERY_", "FLASK_", "FLOWER_", "GUNICORN_", "LISTEN_")
_FOREIGN = (
    "PYTHONHOME",
    "PYTHONINSPECT",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONWARNINGS",
    "WEB_CONCURRENCY",
)
# What `keys` and `status` need to reach the same database and server from another shell.
_KEPT = ("REDIS_URL",)
_KEPT_PREFIX = "SIGNAL_"
# Where storage in S3 is, for a stack that uses it; the credentials are nobody's to write down.
_KEPT_FOR_S3 = (
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
)


def for_process(base: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """`base` without foreign options, with the stack's `own` settings."""
    kept = {
        name: value
        for name, value in base.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    }
    hub = {} if base.get("SIGNAL_ALLOW_HUB") == "1" else {"HF_HUB_OFFLINE": "1"}
    # The current directory must never come before our packages, nor for what the agent starts.
    return kept | hub | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | dict(own)


def settings_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of a stack's environment that holds its settings."""
    kept = (*_KEPT, *_KEPT_FOR_S3) if environment.get("SIGNAL_STORAGE") else _KEPT
    return {
        name: value
        for name, value in environment.items()
        if name in kept or name.startswith(_KEPT_PREFIX)
    }


def current() -> dict[str, str]:
    """This process's environment."""
    return dict(os.environ)
