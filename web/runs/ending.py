"""How a run ends by its owner's word: through the journal, then at once in SQL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flask import Response

from web.context import services
from web.futures.service import FutureRef
from web.operations.answering import accepted, append, futures, result_of, target_of
from web.operations.compile import compile_operation
from web.runs.access import runs


def complete_run(run_id: str, request: Mapping[str, Any]) -> str | Response | None:
    """Queue the last operation and wait for it: the saved artifact's name, or a 202 answer.

    A run with nothing queued, nothing to save and no worker ends without one. Raises SignalError.
    """
    if not request["save"] and _idle(run_id):
        services().journal.close(run_id, "completed")
        _note(run_id, "completed")
        return None
    target = target_of(run_id)
    facts, new = target.facts, compile_operation("complete", request, target)
    with services().wait_slot() as free:
        appended = append(facts, [new])[0][0]
        ref = FutureRef(run_id, appended.entry, appended.tag)
        entry = futures().wait(ref, services().settings.sync_wait_s if free else 0.0)
    if not entry.finished:
        return accepted(facts, entry, {})
    artifact: str | None = json.loads(result_of(entry))["artifact"]
    _note(run_id, "completed")
    return artifact


def complete_soon(run_id: str) -> None:
    """Let a run end behind what is queued, without waiting and without a last artifact.

    Raises SignalError of one that is held or over.
    """
    if _idle(run_id):
        services().journal.close(run_id, "completed")
        _note(run_id, "completed")
        return
    target = target_of(run_id)
    append(target.facts, [compile_operation("complete", {"save": False, "name": None}, target)])


def cancel_run(run_id: str) -> bool:
    """End the run now; False when it had ended before."""
    if not services().journal.close(run_id, "cancelled"):
        return False
    _note(run_id, "cancelled")
    return True


def _idle(run_id: str) -> bool:
    head = services().journal.head(run_id)
    return head is not None and head.entries == head.applied and not head.worker


def _note(run_id: str, status: str) -> None:
    runs().note_closed(run_id, status, None)
