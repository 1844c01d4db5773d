"""Which part of a run's history is kept, and where a branch may begin."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis

from schemas.errors import SignalError
from tests.unit.web.test_render import head, row
from web.history.span import place_to_begin, span_of
from workers.queue.journal import Journal
from workers.queue.records import Past
from workers.settings import Settings
from workers.storage import open_storage
from workers.storage.snapshot_keys import new_snapshot_key

RUN = "run_0123456789abcdef"


@pytest.fixture
def journal(settings: Settings) -> Journal:
    """A journal of which only storage is there."""
    return Journal(Redis.from_url(settings.redis_url), open_storage(settings), settings)


def seal(journal: Journal, first: int, last: int) -> None:
    journal.segments.write(RUN, [past(seq) for seq in range(first, last + 1)])


def snapshot(journal: Journal, seq: int) -> None:
    journal.storage.write(f"{new_snapshot_key(RUN, seq, 1)}/manifest.json", b"{}")


def past(seq: int) -> Past:
    return Past(
        seq=seq, number=seq, tag="0a", kind="sample", status="completed", submitted_at=1.0,
        started_at=2.0, finished_at=3.0, tokens=1, lane="", client_seq=None, digest="", body=b"",
        body_ref="", result=b"", result_ref="", error=None, record={},
    )  # fmt: skip


def ended(journal: Journal, projected: int = 9, **changes: Any) -> dict[str, int] | None:
    return span_of(journal, row(status="completed", projected_seq=projected, **changes), None)


def test_an_ended_run_is_kept_as_far_as_storage_has_it(journal: Journal) -> None:
    assert ended(journal) is None
    seal(journal, 1, 4)
    seal(journal, 5, 9)
    assert ended(journal) == {"from": 0, "to": 9}
    assert ended(journal, 8) == {"from": 0, "to": 8}, "what did not take effect is no state"


def test_history_begins_with_the_oldest_snapshot_once_its_beginning_is_gone(
    journal: Journal,
) -> None:
    seal(journal, 5, 9)
    assert ended(journal) is None, "nothing to begin from"
    snapshot(journal, 4)
    snapshot(journal, 8)
    assert ended(journal) == {"from": 4, "to": 9}


def test_a_run_that_began_elsewhere_needs_a_snapshot(journal: Journal) -> None:
    origin = {"run_id": "run_1", "seq": 3}
    seal(journal, 1, 9)
    assert ended(journal, origin=origin) is None
    snapshot(journal, 0)
    assert ended(journal, origin=origin) == {"from": 0, "to": 9}


def test_a_gap_ends_what_is_kept(journal: Journal) -> None:
    seal(journal, 1, 3)
    seal(journal, 6, 9)
    assert ended(journal) == {"from": 0, "to": 3}


def test_what_is_not_sealed_yet_is_in_the_journal(journal: Journal) -> None:
    seal(journal, 1, 1)
    closed = head(closed="cancelled")
    assert span_of(journal, row(status="cancelled"), closed) == {"from": 0, "to": 3}
    assert span_of(journal, row(status="ready"), None) is None, "lost, and not open again yet"


@pytest.mark.parametrize(
    ("at_seq", "code"), [(6, "validation_error"), (1, "history_gone"), (4, "history_gone")]
)
def test_a_branch_begins_within_what_is_kept(at_seq: int, code: str) -> None:
    span = {"from": 2, "to": 3}
    assert place_to_begin(span, 5, 2) == 2
    assert place_to_begin(span, 3, None) == 3
    with pytest.raises(SignalError) as caught:
        place_to_begin(span, 5, at_seq)
    assert (caught.value.code, caught.value.param) == (code, "at_seq")
    if code == "history_gone":
        assert caught.value.data == {"branchable": span}


def test_without_any_history_there_is_no_branch() -> None:
    with pytest.raises(SignalError) as caught:
        place_to_begin(None, 5, None)
    assert caught.value.data == {"branchable": None}
