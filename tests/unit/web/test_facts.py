"""What a process remembers of runs, and forgets when one is deleted."""

from __future__ import annotations

import pytest

from gpu_pool.database import Database
from schemas.errors import SignalError
from tests.unit.web.test_projector import RUN, add_run
from web.accounts.service import create_user
from web.runs.facts import RunFacts, RunFactsCache, erased
from web.runs.service import forget


@pytest.fixture
def ann(db: Database) -> str:
    add_run(db, RUN, {"a": "b"})
    return create_user(db, "ann").id


def delete(db: Database) -> None:
    with db.writing() as session:
        forget(session, RUN)


def test_a_run_is_remembered_until_its_deletion_is_heard_of(db: Database, ann: str) -> None:
    facts = RunFactsCache(db)
    assert facts.get(RUN, ann).base_model == "tiny"
    delete(db)
    assert facts.get(RUN, ann).base_model == "tiny"
    facts.heard(f"{RUN}:3")
    facts.heard(erased("run_other"))
    assert facts.get(RUN, ann).base_model == "tiny"
    facts.heard(erased(RUN))
    with pytest.raises(SignalError):
        facts.get(RUN, ann)


def test_what_may_have_been_missed_is_looked_up_again(db: Database, ann: str) -> None:
    facts = RunFactsCache(db)
    facts.get(RUN, ann)
    delete(db)
    facts.heard("")
    with pytest.raises(SignalError):
        facts.get(RUN, ann)


class Late(RunFactsCache):
    """Hears of the deletion between reading the run and remembering it."""

    def _remember(self, facts: RunFacts, before: int) -> None:
        self.heard(erased(RUN))
        super()._remember(facts, before)


def test_a_run_that_is_deleted_while_it_is_read_is_not_remembered(db: Database, ann: str) -> None:
    facts = Late(db)
    assert facts.get(RUN, ann).run_id == RUN
    delete(db)
    with pytest.raises(SignalError):
        facts.get(RUN, ann)


def test_nobody_elses_run_is_shown(db: Database, ann: str) -> None:
    facts = RunFactsCache(db)
    for _ in range(2):
        with pytest.raises(SignalError):
            facts.get(RUN, create_user(db, "bob").id)
