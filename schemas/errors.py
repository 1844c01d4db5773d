"""Every error that Signal answers with: one table of codes, one exception.

Web tier, workers and pool raise `SignalError`; the web tier turns it into the one error shape of the
API, a worker into a failed future with the same code. `docs/errors.md` is generated from `ERRORS`.
The status of a stable failure is never one that clients retry (408, 429, 5xx): `retryable` is data,
and a test reads it. This module imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ErrorCode:
    """One row of the table: HTTP `status`, whether a repeat can succeed, and what it means."""

    code: str
    status: int
    retryable: bool
    meaning: str
    retry_after_s: int | None = None


_ROWS = (
    # The request itself.
    ErrorCode(
        "malformed_json", 400, False, "The body is not valid JSON (NaN and Infinity are not JSON)."
    ),
    ErrorCode(
        "validation_error",
        422,
        False,
        "One or more fields are wrong; `details` names each of them.",
    ),
    ErrorCode("unsupported_media_type", 415, False, "The body must be sent as application/json."),
    ErrorCode("payload_too_large", 413, False, "The body is larger than the server accepts."),
    ErrorCode("bad_cursor", 422, False, "The cursor was not issued by this server for this list."),
    ErrorCode(
        "not_supported", 422, False, "The field asks for something that this server cannot do yet."
    ),
    ErrorCode(
        "unknown_model", 422, False, "The operator of this server has not named such a model."
    ),
    ErrorCode("unknown_loss", 422, False, "There is no loss function of that name."),
    ErrorCode("unknown_option", 422, False, "The loss function has no option of that name."),
    ErrorCode("token_out_of_range", 422, False, "A token id is not in the model's vocabulary."),
    ErrorCode(
        "sequence_too_long",
        422,
        False,
        "A sequence does not fit the run's max_seq_length or the model's context.",
    ),
    ErrorCode("no_target_tokens", 422, False, "An example has no token that the loss counts."),
    ErrorCode("chat_template_error", 422, False, "The model's chat template refused the messages."),
    ErrorCode(
        "chat_template_not_prefix_stable",
        422,
        False,
        "The model's chat template rewrites earlier turns, so assistant turns cannot be told apart exactly.",
    ),
    ErrorCode(
        "no_chat_template", 422, False, "The model has no chat template; send text or tokens."
    ),
    # Who asks, and for what.
    ErrorCode("unauthorized", 401, False, "No API key, or not a valid one."),
    ErrorCode("not_found", 404, False, "There is no such thing, or it is not yours."),
    ErrorCode(
        "method_not_allowed",
        405,
        False,
        "The path does not take this method; see the Allow header.",
    ),
    ErrorCode(
        "not_acceptable", 406, False, "The server cannot answer in the asked-for media type."
    ),
    ErrorCode("bad_request", 400, False, "The request could not be understood."),
    ErrorCode("range_not_satisfiable", 416, False, "The file does not have the asked-for range."),
    ErrorCode("future_expired", 410, False, "The result was kept for its time and is gone."),
    ErrorCode(
        "history_gone",
        410,
        False,
        "That part of the run's history is not kept any more; `branchable` says what is.",
    ),
    ErrorCode(
        "state_mismatch",
        422,
        False,
        "The saved state does not fit the run: names, shapes, number formats and hashes must all match.",
    ),
    # The state of things.
    ErrorCode(
        "run_closed",
        409,
        False,
        "The run is completed, cancelled or failed and takes no more operations.",
    ),
    ErrorCode(
        "run_paused",
        409,
        False,
        "The run is paused; resume it, or accept what it waits for.",
    ),
    ErrorCode(
        "rolled_back",
        409,
        False,
        "The server lost the newest operations of the run; resume with accept=rolled_back to go on.",
    ),
    ErrorCode(
        "run_limit", 409, False, "You have as many unfinished runs as this server allows one user."
    ),
    ErrorCode(
        "no_other_device",
        409,
        False,
        "No other device that fits the run is free; migrate it when one is.",
    ),
    ErrorCode(
        "run_in_use",
        409,
        False,
        "Another run is still reading this run's state; delete it once that run is ready.",
    ),
    ErrorCode(
        "idempotency_conflict",
        409,
        False,
        "The Idempotency-Key was used before with another request.",
    ),
    ErrorCode(
        "client_seq_conflict", 409, False, "The lane has another operation under this client_seq."
    ),
    ErrorCode(
        "sequence_gap", 409, False, "An earlier client_seq of the lane did not arrive in time."
    ),
    ErrorCode(
        "already_running", 409, False, "The operation has begun and cannot be cancelled any more."
    ),
    ErrorCode("name_taken", 409, False, "The run already has an artifact of this name."),
    ErrorCode(
        "no_gradients",
        409,
        False,
        "optim_step found no accumulated gradients: call forward_backward first.",
    ),
    ErrorCode(
        "mixed_reductions",
        409,
        False,
        "Losses with different reductions cannot share one accumulation; call optim_step between them.",
    ),
    ErrorCode(
        "predecessor_failed",
        424,
        False,
        "A forward_backward before this optim_step failed; on_error=continue opts out.",
    ),
    ErrorCode("cancelled", 409, False, "The operation was cancelled."),
    ErrorCode("deadline_exceeded", 424, False, "The operation did not begin before its deadline."),
    # What only the worker can know.
    ErrorCode(
        "non_finite",
        422,
        False,
        "The loss or a gradient is not finite; nothing was changed unless the message says so.",
    ),
    ErrorCode(
        "out_of_memory",
        422,
        False,
        "The operation does not fit the device's memory; send smaller batches.",
    ),
    ErrorCode("model_load_failed", 424, False, "The worker could not load the run's model."),
    ErrorCode("worker_start_failed", 424, False, "The run's worker could not be started."),
    ErrorCode("worker_lost", 424, False, "The run's worker died."),
    ErrorCode(
        "operation_crashed_worker",
        424,
        False,
        "The operation ended its worker three times; the run is rebuilt without it and usable.",
    ),
    ErrorCode(
        "journal_lost",
        424,
        False,
        "The server lost its record of the operation, and the run is at the state before it.",
    ),
    ErrorCode(
        "snapshot_damaged",
        424,
        False,
        "A stored state of the run is damaged: a file lacks, or is not what its sha256 says.",
    ),
    ErrorCode(
        "replay_mismatch",
        409,
        False,
        "Executing the journal again did not give the recorded numbers.",
    ),
    ErrorCode(
        "operation_failed",
        424,
        False,
        "The worker failed on this operation; the run is unchanged and usable.",
    ),
    # The server's own trouble: a repeat can succeed.
    ErrorCode(
        "queue_full",
        429,
        True,
        "The run has as many queued operations as allowed; wait for some to finish.",
        1,
    ),
    ErrorCode(
        "too_many_waits", 429, True, "This process already holds as many long polls as it can.", 1
    ),
    ErrorCode(
        "request_in_progress",
        429,
        True,
        "The first request with this Idempotency-Key is still being answered.",
        1,
    ),
    ErrorCode("storage_full", 503, True, "The server's disk is full.", 30),
    ErrorCode(
        "overloaded", 503, True, "Too many requests are under way at once; nothing was done.", 2
    ),
    ErrorCode(
        "unavailable", 503, True, "A part of the server (database, Redis) cannot be reached.", 2
    ),
    ErrorCode(
        "internal_error",
        500,
        True,
        "An unexpected error of the server; the request id finds it in the logs.",
    ),
)

ERRORS: Mapping[str, ErrorCode] = {row.code: row for row in _ROWS}


@dataclass(frozen=True)
class Detail:
    """One wrong field: its dotted path (`batch_data.0.tokens`), a code of `ERRORS` and what to do."""

    param: str | None
    code: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The wire form."""
        return {"param": self.param, "code": self.code, "message": self.message}


class SignalError(Exception):
    """An error with a code of `ERRORS`; the only exception that reaches a client by its own words."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        param: str | None = None,
        details: Iterable[Detail] = (),
        retry_after_s: int | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """`code` must be in the table; `message` defaults to its meaning.

        `data` are facts that a program acts on, such as the `at_seq` of rolled_back.
        """
        self.row = ERRORS[code]
        self.code = code
        self.message = message or self.row.meaning
        self.param = param
        self.details = tuple(details)
        self.data = dict(data or {})
        self.retry_after_s = retry_after_s if retry_after_s is not None else self.row.retry_after_s
        super().__init__(f"{code}: {self.message}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders (Celery, multiprocessing) by pickle, which calls the class
        # with `args` alone.
        state = (self.code, self.message, self.param, self.details, self.retry_after_s, self.data)
        return (_rebuild, state)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.row.status

    def to_dict(self) -> dict[str, Any]:
        """The wire form without the request id, as it is stored with a failed operation."""
        body: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.param is not None:
            body["param"] = self.param
        if self.details:
            body["details"] = [detail.to_dict() for detail in self.details]
        if self.data:
            body["data"] = dict(self.data)
        body["retryable"] = self.row.retryable
        return body

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> SignalError:
        """The reverse of `to_dict`; a code that this version does not know becomes operation_failed."""
        code = str(body.get("code", ""))
        details = [
            Detail(d.get("param"), d.get("code", ""), d.get("message", ""))
            for d in body.get("details", ())
        ]
        known = code if code in ERRORS else "operation_failed"
        return cls(
            known,
            body.get("message"),
            param=body.get("param"),
            details=details,
            data=body.get("data"),
        )


def _rebuild(
    code: str,
    message: str,
    param: str | None,
    details: tuple[Detail, ...],
    retry_after_s: int | None,
    data: dict[str, Any],
) -> SignalError:
    return SignalError(
        code, message, param=param, details=details, retry_after_s=retry_after_s, data=data
    )


def raise_all(details: Iterable[Detail]) -> None:
    """Raise one error that names every detail; nothing happens when there is none.

    A single detail is raised under its own code, several under `validation_error`.
    """
    found = list(details)
    if not found:
        return
    if len(found) == 1:
        only = found[0]
        raise SignalError(only.code, only.message, param=only.param, details=found)
    first = found[0]
    raise SignalError(
        "validation_error",
        f"{len(found)} fields are wrong, the first: {first.message}",
        param=first.param,
        details=found,
    )
