"""Handing entries to the journal and ringing the run's doorbell. No Flask."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.errors import SignalError
from schemas.runs import CLOSED_STATUSES
from web.context import Services
from web.runs.facts import RunFacts
from web.runs.render import LOST
from web.runs.service import Runs
from workers.failpoints import hit
from workers.queue.records import Appended, NewEntry


def submit(
    services: Services, facts: RunFacts, entries: Sequence[NewEntry], key: str | None
) -> list[Appended]:
    """Append all or none, then ring. Raises what `Journal.append` raises."""
    try:
        appended, admitted, bell_was_free = services.journal.append(facts.run_id, entries, key)
    except SignalError as error:
        if error.code == "not_found":
            raise _gone(services, facts) from None
        raise
    hit("web.appended")
    services.ring(facts.run_id, admitted, bell_was_free)
    hit("web.rang")
    return appended


def _gone(services: Services, facts: RunFacts) -> SignalError:
    """Why a run has no journal: it was deleted, it ended long ago, or the server lost its data."""
    known = Runs(services.settings, services.db, services.journal, services.catalogue)
    row = known.get(facts.run_id)
    if row.status in CLOSED_STATUSES:
        return SignalError("run_closed", f"The run is {row.status} and takes no more operations.")
    return SignalError("unavailable", LOST)
