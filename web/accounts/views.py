"""GET /me."""

from __future__ import annotations

from flask import Response, g
from flask.views import MethodView

from schemas.accounts import Account
from web.answers import json_answer
from web.context import user
from web.parsing import Blueprint

blp = Blueprint("accounts", __name__, description="Who asks.")


@blp.route("/me")
class MeView(MethodView):
    """The owner of the key."""

    @blp.response(200, Account, description="The user that the key belongs to.")
    def get(self) -> Response:
        """Read whose key it is

        Tells a client whether its key is valid, and which user it belongs to.
        """
        found = user()
        body = {"object": "user", "user_id": found.id, "name": found.name, "key_id": g.key_id}
        return json_answer(body)
