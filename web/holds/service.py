"""Pausing a run and letting it go on, by its owner's word; the agent and the worker do the rest."""

from __future__ import annotations

from schemas.errors import SignalError
from web.context import services
from web.runs.access import open_head, runs
from web.runs.render import ACCEPT, status_of
from workers.queue.journal import held_error
from workers.queue.records import Head

# Somebody else may change the hold between a look and the deed.
_TRIES = 3


def pause_run(run_id: str) -> None:
    """Hold a run; one that is held already stays so. Raises SignalError run_closed or unavailable."""
    journal = services().journal
    open_head(run_id)
    journal.hold(run_id, "paused", {"reason": "user"})
    _note(run_id)


def resume_run(run_id: str, accept: str | None) -> None:
    """Let a held run go on; one that is not held just goes on.

    Raises SignalError: run_closed, unavailable, and run_paused or rolled_back with `data` that says what
    must be accepted.
    """
    journal = services().journal
    for _ in range(_TRIES):
        head = open_head(run_id)
        if not head.hold:
            return
        needed = ACCEPT.get(head.hold)
        if needed is not None and accept != needed:
            raise _not_accepted(head, needed)
        if journal.release(run_id, head.hold):
            _note(run_id)
            return
    raise SignalError("unavailable", "The run's hold keeps changing; try again in a moment.")


def _not_accepted(head: Head, needed: str) -> SignalError:
    error = held_error(head.hold, head.hold_info)
    text = f"{error.message.rstrip('.')} (accept={needed})."
    return SignalError(error.code, text, data={**head.hold_info, **error.data, "accept": needed})


def _note(run_id: str) -> None:
    """For lists, which read SQL. Twice: a pausing run may have paused meanwhile."""
    for _ in range(2):
        head = services().journal.head(run_id)
        if head is not None and not head.closed:
            runs().note_status(run_id, status_of(runs().get(run_id), head))
