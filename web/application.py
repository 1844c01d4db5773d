"""Puts the application together: services, middleware, errors, and every domain's views."""

from __future__ import annotations

from flask import Flask

from web import admission
from web.accounts import auth
from web.accounts.views import blp as accounts
from web.artifacts.views import blp as artifacts
from web.context import Services
from web.docs.fields import exact
from web.docs.views import blp as docs
from web.docs.views import register_document
from web.errors import SignalApi
from web.events.views import blp as events
from web.futures.views import blp as futures
from web.health.views import blp as health
from web.history.views import blp as history
from web.holds.views import blp as holds
from web.metrics.views import blp as metrics
from web.middleware import install
from web.models.views import blp as models
from web.operations.views import blp as operations
from web.parsing import refuse_query
from web.runs.views import blp as runs
from web.tinker.rest_views import blp as tinker_rest
from web.tinker.views import blp as tinker
from web.tokenization.views import blp as tokenization
from web.version import VERSION
from workers.settings import Settings

DESCRIPTION = """\
Train language models on your own machines through four primitives: `forward_backward`, `optim_step`,
`sample`, `save_state`. Operations of a run take effect in the order of their `seq`. The sync form of a
primitive waits for the result within a bound; past it, and always for `_async`, the answer is 202 with
a future. Every POST takes an `Idempotency-Key`. Every error has one shape.
"""


def build(settings: Settings | None = None) -> Flask:
    """See `web.create_app`."""
    settings = settings or Settings.from_env()
    app = Flask("web", static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=settings.max_body_bytes,
        API_TITLE="Signal",
        API_VERSION=VERSION,
        OPENAPI_VERSION="3.1.0",
        API_SPEC_OPTIONS={"info": {"description": DESCRIPTION}},
    )
    # A path with an empty part is no path of ours, not another spelling of one.
    app.url_map.merge_slashes = False
    app.extensions["signal"] = Services(settings)
    install(app)
    auth.install(app)
    admission.install(app)
    app.before_request(refuse_query)
    api = SignalApi(app)
    api.ma_plugin.converter.add_attribute_function(exact)
    lives = (runs, holds, history, events)
    for blp in (
        *lives,
        operations,
        futures,
        tokenization,
        metrics,
        artifacts,
        models,
        accounts,
        health,
    ):
        api.register_blueprint(blp)
    app.register_blueprint(docs)
    app.register_blueprint(tinker)
    app.register_blueprint(tinker_rest)
    register_document(app, api)
    return app
