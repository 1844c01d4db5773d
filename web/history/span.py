"""Which part of a run's history is kept: the seqs at which a branch can begin. No Flask."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.errors import SignalError
from schemas.runs import CLOSED_STATUSES
from web.runs.render import History, applied_seq, branchable_of
from web.runs.tables import RunRow
from workers.queue.journal import Journal
from workers.queue.records import Head
from workers.queue.segments import Segment
from workers.storage.snapshot_keys import snapshot_infos


def span_of(journal: Journal, row: RunRow, head: Head | None) -> History | None:
    """The kept history: of an open run by the journal's word, of an ended one by what storage has."""
    if head is not None and not head.closed:
        return branchable_of(row, head)
    if head is None and row.status not in CLOSED_STATUSES:
        return None
    applied, from_nothing = applied_seq(row, head), row.origin is None
    if head is not None and head.base == 0 and from_nothing:
        return {"from": 0, "to": applied}
    snapshots = [info.seq for info in snapshot_infos(journal.storage, row.run_id)]
    span = _stored(snapshots, journal.segments.all(row.run_id), from_nothing)
    if span is not None and head is not None and head.base < head.seq_count:
        # The rest is still in the journal.
        span["to"] = applied
    if span is None or span["from"] > applied:
        return None
    return {**span, "to": min(span["to"], applied)}


def _stored(
    snapshots: Sequence[int], segments: Sequence[Segment], from_nothing: bool
) -> History | None:
    """From the oldest state that can be had, as far as segments follow without a gap."""
    whole = from_nothing and bool(segments) and segments[0].first == 1
    if not whole and not snapshots:
        return None
    first = upto = 0 if whole else min(snapshots)
    for segment in segments:
        if segment.first <= upto + 1:
            upto = max(upto, segment.last)
    return {"from": first, "to": max([upto, *snapshots])}


def place_to_begin(span: History | None, applied: int, at_seq: int | None) -> int:
    """The seq of a branch. Raises SignalError validation_error above `applied`, else history_gone."""
    wanted = applied if at_seq is None else at_seq
    if wanted > applied:
        text = f"The run is at seq {applied}; a branch can only begin at what it has done."
        raise SignalError("validation_error", text, param="at_seq")
    if span is None or not span["from"] <= wanted <= span["to"]:
        kept = f"{span['from']} to {span['to']}" if span else "none"
        text = f"The state at seq {wanted} is not kept any more; kept is {kept}."
        raise SignalError("history_gone", text, param="at_seq", data={"branchable": span})
    return wanted
