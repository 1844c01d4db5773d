"""GET /health, GET /ready."""

from __future__ import annotations

import time
from collections.abc import Callable

from flask import Response
from flask.views import MethodView
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from schemas.errors import Detail, SignalError
from schemas.service import Health, Ready
from web.answers import json_answer
from web.context import services
from web.parsing import Blueprint
from web.version import VERSION
from workers.queue import keys

blp = Blueprint("health", __name__, description="The service itself.")

# A worker that has not reported for so long is not counted.
FRESH_S = 10.0


@blp.route("/health")
class HealthView(MethodView):
    """Liveness."""

    @blp.doc(security=[])
    @blp.response(200, Health, description="This process answers.")
    def get(self) -> Response:
        """Is the process alive?"""
        return json_answer({"status": "healthy", "version": VERSION})


@blp.route("/ready")
class ReadyView(MethodView):
    """Readiness."""

    @blp.doc(security=[])
    @blp.response(200, Ready, description="This process reaches SQL and Redis.")
    def get(self) -> Response:
        """Can the process serve?

        Checks SQL and Redis. The number of live workers is reported, not required.
        """
        failed = [name for name, check in _CHECKS.items() if not _passes(check)]
        if failed:
            details = [Detail(name, "unavailable", f"{name} cannot be reached.") for name in failed]
            raise SignalError(
                "unavailable", f"{' and '.join(failed)} cannot be reached.", details=details
            )
        checks = dict.fromkeys(_CHECKS, "ok")
        return json_answer({"status": "ready", "checks": checks, "workers": _workers()})


def _passes(check: Callable[[], object]) -> bool:
    try:
        check()
    except (SQLAlchemyError, RedisError, OSError):
        return False
    return True


def _sql() -> None:
    with services().db.reading() as session:
        session.execute(text("SELECT 1"))


def _redis() -> None:
    services().redis.ping()


def _workers() -> int:
    redis, now = services().redis, time.time()
    names = list(redis.scan_iter(keys.worker("*"), count=1000))
    beats = [redis.hget(name, "heartbeat") for name in names]
    return sum(now - float(beat) < FRESH_S for beat in beats if beat)


_CHECKS: dict[str, Callable[[], object]] = {"sql": _sql, "redis": _redis}
