"""From a compiled operation to an answer: into the journal, then its result, its error, or its future."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence

from flask import Response, after_this_request

from schemas.errors import SignalError
from web.admission import end_turn, end_work
from web.answers import raw_answer
from web.context import services, user
from web.futures.render import future_bytes
from web.futures.service import FutureRef, Futures
from web.history.saved import Saved, find_saved
from web.idempotency.keys import REPLAYED, idempotency_key
from web.operations.compile import Target
from web.operations.submit import submit
from web.runs.facts import RunFacts
from workers.queue.futures import future_id
from workers.queue.records import Appended, Entry, NewEntry

RETRY_AFTER_S = 1


def target_of(run_id: str) -> Target:
    """The caller's run and its model. Raises SignalError not_found."""
    s = services()
    facts = s.facts.get(run_id, user().id)
    entry = s.catalogue.entry(facts.base_model)
    return Target(facts, entry, own_saved, s.settings.max_group)


def own_saved(run_id: str, name: str, path: str) -> Saved:
    """A state that the caller has saved. Raises SignalError not_found or state_mismatch."""
    s = services()
    try:
        s.facts.get(run_id, user().id)
    except SignalError as error:
        raise SignalError(error.code, error.message, param=f"{path}run_id") from None
    return find_saved(s.storage, run_id, name, f"{path}artifact")


def append(facts: RunFacts, entries: Sequence[NewEntry]) -> tuple[list[Appended], dict[str, str]]:
    """Submit under the request's Idempotency-Key; with the headers that the answer carries.

    Without a key of the client's, one of ours: the connection to Redis repeats a command whose reply
    was lost, and what the command did must not be done twice.
    """
    s, key = services(), idempotency_key()
    if any(len(entry.body) > s.settings.inline_bytes for entry in entries):
        # Nobody is to wait for storage because another has a large body.
        end_turn()
    appended = submit(s, facts, entries, f"c:{key}" if key else f"r:{secrets.token_hex(8)}")
    end_work()
    replayed = key is not None and all(one.replayed for one in appended)
    return appended, {REPLAYED: "true"} if replayed else {}


def answer_when_done(facts: RunFacts, entry: NewEntry) -> Response:
    """The sync form: 200 with the result, the operation's error, or 202 when the bound is over."""
    s = services()
    # The place for a wait and the watch come first, so that nothing can finish unseen.
    with s.wait_slot() as free, s.hub.watch(facts.run_id) as event:
        appended, headers = append(facts, [entry])
        seconds = s.settings.sync_wait_s if free else 0.0
        found = _wait(facts, entry, appended[0], event, seconds)
    if not found.finished:
        return _accepted(facts, found, appended[0].applied, headers)
    _name_future(facts, found)
    return raw_answer(result_of(found), 200, headers)


def answer_at_once(facts: RunFacts, entry: NewEntry, *behind: NewEntry) -> Response:
    """The `_async` form: 202 with the future; of the first, when others are to follow it."""
    appended, headers = append(facts, [entry, *behind])
    found = as_appended(facts, entry, appended[0])
    return _accepted(facts, found, appended[0].applied, headers)


def futures_of(
    facts: RunFacts, entries: Sequence[NewEntry], appended: Sequence[Appended]
) -> list[bytes]:
    """The futures of operations that were appended together."""
    found = [as_appended(facts, new, where) for new, where in zip(entries, appended, strict=True)]
    return [
        _future(facts, entry, where.applied) for entry, where in zip(found, appended, strict=True)
    ]


def accepted(facts: RunFacts, entry: Entry, headers: dict[str, str]) -> Response:
    """202 with the future of an entry of the journal."""
    head = services().journal.head(facts.run_id)
    return _accepted(facts, entry, head.applied if head else 0, headers)


def result_of(entry: Entry) -> bytes:
    """The stored result of a finished entry. Raises the SignalError that it ended with."""
    if entry.status != "completed":
        raise SignalError.from_dict(entry.error or {})
    raw = services().journal.result(entry)
    if raw is None:
        raise SignalError("future_expired")
    return raw


def futures() -> Futures:
    """The futures of this server."""
    s = services()
    return Futures(s.settings, s.journal, s.hub, s.facts.is_open)


def _wait(
    facts: RunFacts, new: NewEntry, where: Appended, event: threading.Event, seconds: float
) -> Entry:
    ref = FutureRef(facts.run_id, where.entry, where.tag)
    found = as_appended(facts, new, where)
    deadline = time.monotonic() + seconds
    while not found.finished and (left := deadline - time.monotonic()) > 0:
        event.wait(left)
        event.clear()
        found = futures().entry(ref)
    return found


def as_appended(facts: RunFacts, new: NewEntry, where: Appended) -> Entry:
    """The entry as it is now: of a fresh one everything is known without asking."""
    if where.replayed:
        return futures().entry(FutureRef(facts.run_id, where.entry, where.tag))
    return Entry(
        run_id=facts.run_id,
        number=where.entry,
        seq=where.seq,
        kind=new.kind,
        status=where.status,
        lane=new.lane,
        client_seq=new.client_seq,
        submitted_at=where.submitted_at,
        started_at=None,
        finished_at=None,
        tokens=new.tokens,
        error=None,
        result_ref="",
        digest=new.digest,
        tag=where.tag,
    )


def _name_future(facts: RunFacts, entry: Entry) -> None:
    """Puts the future's id in the answer's head, also when that is the error that the operation ended in.

    By it a client tells an operation that has failed from a request that was refused.
    """
    where = future_id(services().settings, facts.run_id, entry.number, entry.tag)

    def add(response: Response) -> Response:
        response.headers["Signal-Future-Id"] = where
        return response

    after_this_request(add)


def _accepted(facts: RunFacts, entry: Entry, applied: int, headers: dict[str, str]) -> Response:
    where = future_id(services().settings, facts.run_id, entry.number, entry.tag)
    extra = {"Location": f"/futures/{where}", "Retry-After": str(RETRY_AFTER_S)}
    return raw_answer(_future(facts, entry, applied), 202, {**headers, **extra})


def _future(facts: RunFacts, entry: Entry, applied: int) -> bytes:
    s = services()
    result = s.journal.result(entry) if entry.finished else None
    return future_bytes(s.settings, entry, applied, result)
