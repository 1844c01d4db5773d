"""Results of operations in the SDK's forms: protobuf for losses and samples, JSON for all else. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from schemas.errors import SignalError
from web.tinker.datums import FLOAT32
from web.tinker.protobuf import put_block, put_double, put_int, put_ints, put_text

_STOP, _LENGTH = 0, 1
# What fills the cells of a table of likeliest tokens that hold none.
_NO_LOGPROB = -99999.0
# What is added up over the parts of a call that the client has split; all else is averaged.
_ADDED = ("input_tokens", "num_tokens")
# The server's failures, as opposed to what the request asked for.
_SERVERS_FAULT = frozenset(
    (
        "model_load_failed", "worker_start_failed", "worker_lost", "operation_crashed_worker",
        "journal_lost", "snapshot_damaged", "replay_mismatch", "operation_failed", "internal_error",
        "unavailable", "storage_full",
    )
)  # fmt: skip


def loss_output(result: Mapping[str, Any]) -> bytes:
    """The ForwardBackwardOutput of a forward_backward, or of a forward with a loss."""
    rows = result["rows"]
    metrics = {"loss:sum": result["loss_sum"], **_metrics(result["metrics"])}
    record = put_text(1, "ArrayRecord")
    record += put_block(2, put_text(1, "logprobs") + put_block(2, _batched(rows)))
    record += put_int(3, len(rows))
    out = put_text(1, "ArrayRecord") + put_block(2, record)
    for name, value in metrics.items():
        out += put_block(3, put_text(1, name) + put_double(2, value))
    return out


def _metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each with the word that says how the parts of a split call are put together."""
    return {
        f"{name}:{'sum' if name in _ADDED else 'mean'}": value for name, value in metrics.items()
    }


def _batched(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows' log-probabilities one after another; rows of several targets must have equally many."""
    data, offsets, widths = array("f"), array("q", [0]), set[int]()
    for row in rows:
        numbers = row["logprobs"]
        wide = bool(numbers) and isinstance(numbers[0], list)
        widths.add(len(numbers[0]) if wide else 1)
        data.extend(chain.from_iterable(numbers) if wide else numbers)
        offsets.append(4 * len(data))
    if len(widths) > 1:
        raise SignalError("not_supported", "All data of a call must have equally many targets.")
    width = widths.pop() if widths else 1
    out = put_block(1, data.tobytes()) + put_block(2, offsets.tobytes()) + put_int(3, FLOAT32)
    return out + (put_ints(4, [width]) if width > 1 else b"")


def sample_output(result: Mapping[str, Any], last_n: int | None = None) -> bytes:
    """The SampleResponse of a sample of one prompt; `last_n` prompt tokens alone are to be scored."""
    out = b"".join(put_block(1, _sequence(sample)) for sample in result["samples"][0])
    if result["prompt_logprobs"] is not None:
        out += put_block(2, array("f", _scored(result["prompt_logprobs"][0], last_n)).tobytes())
    if result["prompt_top_token_ids"] is not None:
        ids, values = result["prompt_top_token_ids"][0], result["prompt_top_logprobs"][0]
        out += put_block(3, _table(_last(ids, last_n), _last(values, last_n)))
    return out


def _sequence(sample: Mapping[str, Any]) -> bytes:
    out = put_int(1, _STOP if sample["finish_reason"] == "stop" else _LENGTH)
    out += put_block(2, array("i", sample["token_ids"]).tobytes())
    if sample["logprobs"] is not None:
        out += put_block(3, array("f", sample["logprobs"]).tobytes())
    if sample["top_token_ids"] is not None:
        out += put_block(4, _table(sample["top_token_ids"], sample["top_logprobs"]))
    return out


def _scored(logprobs: Sequence[float | None], last_n: int | None) -> Iterator[float]:
    return (math.nan if value is None else value for value in _last(logprobs, last_n))


def _last(values: Sequence[Any], last_n: int | None) -> list[Any]:
    """The values with None in place of those before the last `last_n`."""
    if last_n is None:
        return list(values)
    return [None] * (len(values) - last_n) + list(values[len(values) - last_n :])


def _table(ids: Sequence[Any], logprobs: Sequence[Any]) -> bytes:
    width = max((len(row) for row in ids if row is not None), default=0)
    tokens, values = array("i"), array("f")
    for row, numbers in zip(ids, logprobs, strict=True):
        given = [] if row is None else row
        empty = width - len(given)
        tokens.extend([*given, *[0] * empty])
        values.extend([*(numbers or []), *[_NO_LOGPROB] * empty])
    out = put_block(1, tokens.tobytes()) + put_block(2, values.tobytes())
    return out + put_int(3, width) + put_int(4, len(ids))


def step_output(result: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of optim_step."""
    names = ("grad_norm", "learning_rate")
    return {"metrics": {**{name: result[name] for name in names}, **result["metrics"]}}


def failure(error: Mapping[str, Any]) -> dict[str, Any]:
    """What a future holds whose operation has failed: the words of the error, and whose fault it is."""
    code = str(error.get("code", ""))
    text = str(error.get("message") or code)
    if error.get("param"):
        text = f"{error['param']}: {text}"
    category = "server" if code in _SERVERS_FAULT else "user"
    return {"error": f"{text} ({code})", "category": category, "code": code}
