"""What generated requests are aimed at: a user of their own, with a run, a future and an artifact.

Ids that a generator makes up reach no further than a 404. So most requests get the id of something that
exists, and a few keep theirs. No request waits long or samples much, and none ends the run that the
others need: what a request may end is made for it.
"""

from __future__ import annotations

import itertools
import re
import zlib
from typing import Any

from schemathesis import Case, GenerationMode, Response

from tests.support.api import BATCH, Api, Run
from tests.support.stack import RunningStack

ARTIFACT = "saved"
# Greater numbers are as valid, but cost seconds.
_ENOUGH = {"wait": 0.05, "max_tokens": 3, "n": 2, "client_seq": 1}
# What a valid request must hold to be more than a 422, beyond what a schema can say.
_MEANT: dict[str, Any] = {
    "base_model": "tiny",
    "batch_data": BATCH["batch_data"],
    "loss_fn": "causal_lm",
    "loss_kwargs": {},
    "operations": [{"kind": "forward_backward", **BATCH}, {"kind": "optim_step"}],
}
_ENDING = ("post /runs/{run_id}/complete", "post /runs/{run_id}/cancel", "delete /runs/{run_id}")
# After these the run takes no operation, or not soon.
_HINDERING = (*_ENDING, "post /runs/{run_id}/pause", "post /runs/{run_id}/migrate")
_MAKING = ("post /runs", "post /runs/{run_id}/branch", "post /runs/{run_id}/replay")
_KEY = "Idempotency-Key"


class Subject:
    """A user's things on a running server."""

    def __init__(self, stack: RunningStack) -> None:
        """Makes them."""
        self.base_url, key = stack.base_url, stack.new_user("contract")
        self.headers = {"Authorization": f"Bearer {key}"}
        self._api = Api(stack, key)
        self._victim: str | None = None
        self._numbers = itertools.count()
        self._run = Run(self._api, self._api.create(name="contract", labels={"tier": "contract"}))
        self._run.ok("/forward_backward", BATCH)
        step = self._run.post("/optim_step")
        self._run.ok("/save_state", {"name": ARTIFACT})
        self._ids = {
            "run_id": self._run.id,
            "future_id": step.headers["Signal-Future-Id"],
            "name": ARTIFACT,
            "path": "adapter_config.json",
        }

    def aim(self, case: Case) -> None:
        """Give a generated request real ids, a key of its own, and modest wishes."""
        for name, value in case.path_parameters.items():
            if not _keeps(value):
                case.path_parameters[name] = self._real(case, name)
        if "ids" in case.query and not _keeps(case.query["ids"]):
            case.query["ids"] = ",".join([self._ids["future_id"]] * 2)
        number = next(self._numbers)
        _lower(case.query)
        if isinstance(case.body, dict):
            _lower(case.body)
            if _is_valid(case):
                # A hundred prompts tell no more than two.
                case.body |= {"prompts": case.body["prompts"][:2]} if "prompts" in case.body else {}
                meant = {**_MEANT, "lane": f"lane-{number}"}
                case.body |= {name: meant[name] for name in case.body if name in meant}
        # The generator knows few keys, and under a used one every other request is a conflict.
        if number % 8 and re.fullmatch("[!-~]{1,255}", str(case.headers.get(_KEY, ""))):
            case.headers[_KEY] = f"contract-{number}"

    def tidy(self, case: Case, response: Response) -> None:
        """Undo what would hinder later requests."""
        # A generated request may have another method than its operation.
        done = f"{response.request.method} {case.operation.path}".lower()
        if done in _MAKING and response.status_code in (201, 202):
            self._cancel(str(response.json()["run_id"]))
        if done in _ENDING and response.status_code in (200, 202, 204):
            self._victim = None

    def close(self) -> None:
        """Free the devices; fails when a request has done the shared run any harm."""
        assert self._run.ok("/forward_backward", BATCH)["loss"] > 0
        self._cancel(self._run.id)
        if self._victim is not None:
            self._cancel(self._victim)
        self._api.http.close()

    def _real(self, case: Case, name: str) -> str:
        if f"{case.operation.method} {case.operation.path}".lower() in _HINDERING:
            self._victim = self._victim or self._api.create()
            return self._victim
        return "tiny" if case.operation.path.startswith("/models/") else self._ids[name]

    def _cancel(self, run_id: str) -> None:
        self._api.post(f"/runs/{run_id}/cancel").raise_for_status()


def _keeps(value: object) -> bool:
    return zlib.crc32(str(value).encode("utf-8", "replace")) % 4 == 0


def _lower(values: dict[str, Any]) -> None:
    for name, limit in _ENOUGH.items():
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > limit:
            values[name] = limit


def _is_valid(case: Case) -> bool:
    return case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE
