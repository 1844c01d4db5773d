"""The runs of this server, and an open run's journal, for views and what is behind them."""

from __future__ import annotations

from schemas.errors import SignalError
from schemas.runs import CLOSED_STATUSES
from web.context import services
from web.runs.render import LOST, status_of
from web.runs.service import Runs
from workers.queue.records import Head


def runs() -> Runs:
    """The service, over the application's parts."""
    s = services()
    return Runs(s.settings, s.db, s.journal, s.catalogue)


def open_head(run_id: str) -> Head:
    """What the journal says of an open run. Raises SignalError run_closed or unavailable."""
    head = services().journal.head(run_id)
    status = status_of(runs().get(run_id), None) if head is None else head.closed
    if status in CLOSED_STATUSES:
        raise SignalError("run_closed", f"The run is {status}.")
    if head is None:
        raise SignalError("unavailable", LOST)
    return head
