"""Calls that are larger than the server takes at once: several operations that answer as one.

Gradients add up over calls until the optimizer's step, so a batch may be split anywhere between its
examples; the numbers of the whole follow from those of its parts. What a loss computes over one call by
its definition is never split: the server then refuses the batch by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, TypeVar, cast

from rewardsignal._exceptions import SignalAPIError
from rewardsignal._futures import ENDED, APIFuture
from rewardsignal._poller import Poller
from rewardsignal._records import Record
from rewardsignal._schemas import (
    MAX_BATCH,
    MAX_SAMPLES,
    ForwardBackwardResult,
    ForwardResult,
    ForwardRow,
    Future,
    SampleResult,
    ScoredRow,
    Timings,
)
from rewardsignal._transport import encode

T = TypeVar("T", bound=Record)
R = TypeVar("R", ForwardRow, ScoredRow)
Body = Mapping[str, Any]

# Of one operation's JSON: below what servers take unless they are told to take less.
MAX_OPERATION_BYTES = 16 * 2**20


def parts_of(kind: str, body: Body) -> list[tuple[Body, bytes]]:
    """The operations that together do what `body` asks, each with its JSON; itself where it fits."""
    listed = body.get("batch_data" if kind in _BATCHED else "prompts")
    if not isinstance(listed, list | tuple):
        return [(body, encode(body))]
    if len(listed) <= (MAX_BATCH if kind in _BATCHED else MAX_BATCH // max(1, _copies(body))):
        content = encode(body)
        if len(content) <= MAX_OPERATION_BYTES or kind not in _BATCHED:
            return [(body, content)]
    parts = _batches(kind, body) if kind in _BATCHED else _samples(body)
    return [(part, encode(part)) for part in parts]


_BATCHED = ("forward_backward", "forward")


class SplitFuture(APIFuture[T]):
    """Several operations as one: it ends when all have ended, in the first error there is.

    `seq` and `future_id` are those of the last one.
    """

    def __init__(
        self,
        poller: Poller,
        run_id: str,
        kind: str,
        parts: Sequence[tuple[APIFuture[Any], Body]],
    ) -> None:
        """`parts` with their bodies, in their order."""
        super().__init__(poller, run_id, kind)
        self._parts = [future for future, _ in parts]
        self._sizes = [
            len(body.get("batch_data") or body.get("prompts") or ()) for _, body in parts
        ]
        for part, before in zip(self._parts, accumulate(self._sizes, initial=0), strict=False):
            part.part_of = (id(self), before)
        self._whole: T | None = None

    def parts(self) -> Sequence[APIFuture[Any]]:
        """The operations behind it."""
        return self._parts

    @property
    def seq(self) -> int | None:
        """The last operation's place."""
        return self._parts[-1].seq

    @property
    def accepted(self) -> bool:
        """Whether all have a place."""
        return all(part.accepted for part in self._parts)

    @property
    def settled(self) -> bool:
        """Whether the end of all is known here."""
        return all(part.settled for part in self._parts)

    def status(self) -> Future:
        """Of the first operation that has not ended well, or of the last."""
        for part in self._parts:
            shown = part.status()
            if shown.status != "completed":
                break
        return shown

    def done(self) -> bool:
        """Whether all have ended, well or not; asks the server."""
        return all(part.settled or part.status().status in ENDED for part in self._parts)

    def cancel(self) -> bool:
        """Cancel what can still be cancelled, the last first; whether anything was."""
        cancelled = [part.cancel() for part in reversed(self._parts)]
        return any(cancelled)

    def take_back(self) -> None:
        """Cancel the parts that were taken before one was refused: half a batch is no batch."""
        for part in reversed(self._parts):
            if part.accepted:
                with suppress(SignalAPIError):
                    part.cancel()

    def when_ended(self, on_end: Callable[[Exception | None], None]) -> Callable[[], None]:
        """Call `on_end` once all have ended, or with the first reason why that cannot be known."""
        lock, left, told = threading.Lock(), len(self._parts), False

        def one_ended(error: Exception | None) -> None:
            nonlocal left, told
            with lock:
                left -= 1
                tell = not told and (left == 0 or error is not None)
                told |= tell
            if tell:
                on_end(error)

        leave = [part.when_ended(one_ended) for part in self._parts]

        def leave_all() -> None:
            for undo in leave:
                undo()

        return leave_all

    def _outcome(self) -> T:
        if self._whole is None:
            results = [part.result() for part in self._parts]
            self._whole = cast(T, _JOINED[self.kind](results, self._sizes))
        return self._whole

    def _sent_id(self) -> str:
        return [part.future_id for part in self._parts][-1]

    def __repr__(self) -> str:
        return f"<APIFuture {self.kind} of {len(self._parts)} operations, seq={self.seq}>"


def named_by_call(error: SignalAPIError, futures: Sequence[APIFuture[Any]]) -> SignalAPIError:
    """The error of a request of one call's parts, with the fields by their names in the call."""
    parts = [future.part_of for future in futures]
    if any(part is None or parts[0] is None or part[0] != parts[0][0] for part in parts):
        return error
    befores = [part[1] for part in parts if part is not None]
    data = error.response_data
    for named in (data, *error.details):
        if isinstance(named.get("param"), str):
            named["param"] = _in_call(named["param"], befores)
    return error


def _in_call(param: str, befores: Sequence[int]) -> str:
    found = re.fullmatch(r"(?:operations\.(\d+)\.)?(\w+)(?:\.(\d+))?(\..*)?", param)
    if found is None:
        return param
    part, field, item, rest = int(found[1] or 0), found[2], found[3], found[4] or ""
    if item is None or field not in ("batch_data", "prompts") or part >= len(befores):
        return f"{field}{'' if item is None else '.' + item}{rest}"
    return f"{field}.{befores[part] + int(item)}{rest}"


def _batches(kind: str, body: Body) -> list[Body]:
    batch = body["batch_data"]
    if kind == "forward_backward" and _is_of_one_call(
        body.get("loss_fn"), body.get("loss_kwargs") or {}
    ):
        return [body]
    pieces = [
        small
        for begin in range(0, len(batch), MAX_BATCH)
        for small in _small(batch[begin : begin + MAX_BATCH])
    ]
    if len(pieces) < 2:
        return [body]
    first = {**body, "batch_data": pieces[0]}
    # What is asked of the accumulation before the call is asked of its first part alone.
    rest = {name: value for name, value in body.items() if name != "accumulate"}
    return [first, *({**rest, "batch_data": piece} for piece in pieces[1:])]


def _is_of_one_call(loss_fn: str | None, options: Body) -> bool:
    return (
        loss_fn == "kto"
        or options.get("loss_type") == "bnpo"
        or options.get("scale_rewards") == "batch"
    )


def _small(batch: Sequence[Any]) -> list[Sequence[Any]]:
    """Pieces whose JSON is not too large, as far as examples allow."""
    if len(batch) < 2 or len(encode(batch)) <= MAX_OPERATION_BYTES:
        return [batch]
    half = len(batch) // 2
    return [*_small(batch[:half]), *_small(batch[half:])]


def _samples(body: Body) -> list[Body]:
    prompts, copies = body["prompts"], _copies(body)
    most = min(MAX_BATCH, MAX_SAMPLES // copies) if copies else len(prompts)
    if len(prompts) <= most:
        return [body]
    first = body.get("first_row", 0)
    return [
        {**body, "prompts": prompts[begin : begin + most], "first_row": first + begin * copies}
        for begin in range(0, len(prompts), most)
    ]


def _copies(body: Body) -> int:
    """Samples per prompt; 0 where the server will refuse what is asked for."""
    copies = body.get("n", 1)
    return copies if isinstance(copies, int) and 1 <= copies <= MAX_SAMPLES else 0


def _joined_gradients(
    results: Sequence[ForwardBackwardResult], sizes: Sequence[int]
) -> ForwardBackwardResult:
    last = results[-1]
    divisor = math.fsum(result.divisor for result in results)
    loss_sum = math.fsum(result.loss_sum for result in results)
    # The norm of a sum is not in the norms of its parts; the server knows that of all gradients so far,
    # which is the call's own where nothing was accumulated before.
    alone = last.accumulated_calls == len(results)
    return dataclasses.replace(
        last,
        loss=loss_sum / divisor if divisor else last.loss,
        loss_sum=loss_sum,
        divisor=divisor,
        num_tokens=sum(result.num_tokens for result in results),
        grad_norm=last.accumulated_grad_norm if alone else math.nan,
        metrics=_joined_metrics(results),
        metric_counts=_summed(result.metric_counts for result in results),
        rows=None if last.rows is None else _numbered([one.rows or [] for one in results], sizes),
        timings=_joined_timings(results),
    )


def _joined_metrics(results: Sequence[ForwardBackwardResult]) -> dict[str, float]:
    """Means are weighted by what they are over; what is over nothing is a count and adds up."""
    counts = _summed(result.metric_counts for result in results)
    totals = _summed(
        {
            name: value * result.metric_counts.get(name, 1.0)
            for name, value in result.metrics.items()
        }
        for result in results
    )
    return {name: total / counts.get(name, 1.0) for name, total in totals.items()}


def _joined_rows(results: Sequence[ForwardResult], sizes: Sequence[int]) -> ForwardResult:
    return dataclasses.replace(
        results[-1],
        rows=_numbered([result.rows for result in results], sizes),
        metrics=_summed(result.metrics for result in results),
        timings=_joined_timings(results),
    )


def _numbered(parts: Sequence[Sequence[R]], sizes: Sequence[int]) -> list[R]:
    """The rows of all parts; each says of which example of the whole it was made."""
    rows: list[R] = []
    before = 0
    for part, size in zip(parts, sizes, strict=True):
        rows += [dataclasses.replace(row, example=row.example + before) for row in part]
        before += size
    return rows


def _joined_samples(results: Sequence[SampleResult], sizes: Sequence[int]) -> SampleResult:
    lists: dict[str, Any] = {
        name: [item for result in results for item in getattr(result, name)]
        for name in _SAMPLE_LISTS
        if all(getattr(result, name) is not None for result in results)
    }
    return dataclasses.replace(
        results[-1],
        **lists,
        metrics=_summed(result.metrics for result in results),
        timings=_joined_timings(results),
    )


_SAMPLE_LISTS = (
    "samples",
    "prompt_token_ids",
    "prompt_logprobs",
    "prompt_top_token_ids",
    "prompt_top_logprobs",
    "outputs",
    "token_ids",
    "tokens",
    "logprobs",
)
_JOINED: Mapping[str, Callable[[Any, Sequence[int]], Record]] = {
    "forward_backward": _joined_gradients,
    "forward": _joined_rows,
    "sample": _joined_samples,
}


def _joined_timings(results: Sequence[Any]) -> Timings:
    return Timings(
        queued_ms=results[0].timings.queued_ms,
        execute_ms=math.fsum(result.timings.execute_ms for result in results),
    )


def _summed(counted: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in counted:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + value
    return total
