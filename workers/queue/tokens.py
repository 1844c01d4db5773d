"""Tokens of a sample on their way to whoever watches: a short-lived stream per operation in Redis.

The result in the journal is the truth; what is here may be lost and is written again from the beginning
when another worker samples anew, which `BEGIN` marks. `END` follows the result: nobody waits for more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from redis import Redis

from workers.queue import keys

BEGIN, END = "begin", "end"
TTL_S = 600
# More than any answer holds.
_MOST = 200_000


def _name(run_id: str, number: int) -> str:
    return f"{keys.prefix(run_id)}t:{number}"


def begin(redis: Redis, run_id: str, number: int) -> None:
    """What was written before is void."""
    _write(redis, run_id, number, BEGIN)


def end(redis: Redis, run_id: str, number: int) -> None:
    """The operation has ended, and its result can be read."""
    _write(redis, run_id, number, END)


def write(redis: Redis, run_id: str, number: int, tokens: Sequence[dict[str, Any]]) -> None:
    """Tokens in the order in which they were sampled."""
    _write(redis, run_id, number, json.dumps(tokens, allow_nan=False, separators=(",", ":")))


def _write(redis: Redis, run_id: str, number: int, data: str) -> None:
    pipe = redis.pipeline(transaction=False)
    pipe.xadd(_name(run_id, number), {"d": data}, maxlen=_MOST, approximate=True)
    pipe.expire(_name(run_id, number), TTL_S)
    pipe.execute()


def read(
    redis: Redis, run_id: str, number: int, after: str, block_ms: int
) -> tuple[str, list[str | list[dict[str, Any]]]]:
    """What came after the place `after` ("0" at first) and the new place; waits for it `block_ms`."""
    found = cast(
        list[Any], redis.xread({_name(run_id, number): after}, count=500, block=block_ms) or []
    )
    rows = found[0][1] if found else []
    texts = [fields[b"d"].decode() for _, fields in rows]
    place = rows[-1][0].decode() if rows else after
    return place, [text if text in (BEGIN, END) else json.loads(text) for text in texts]
