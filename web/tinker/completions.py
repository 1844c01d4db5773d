"""Which samples of a sampling session have ended, for clients that wait for many in one request.

Every sample is noted here before its submission is answered: its client does not say how it waits. A poll
looks at the oldest of those that wait, moves the ended to a list under a growing number, the cursor, and says
what is there past the client's; what the client has seen is forgotten. So an answer that is lost on its way
is given again. Results are read by retrieve_future.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.errors import SignalError
from web.context import services
from web.tinker import samplers
from web.tinker.tables import SamplerRow
from workers.queue import keys

# Numbers of a copy's requests begin here, times the number that join_sampling_session gave it.
COPY = 1_000_000_000
# Samples are begun in the order of arrival, so those behind so many that wait have not ended.
_LOOKED_AT = 1024
# The SDK reads results of so many bytes at once. By the size that is said of each, which few results have, it
# reads 64 at once, and not the hundreds that may end together.
READ_BYTES, _SAID_BYTES = 64 * 1024 * 1024, 1024 * 1024
# After a wake that is not for this poll: others' operations end on the same run.
_PAUSE_S = 0.005

# KEYS: the run's prefix. ARGV: name, request id, seconds to live.
_NOTE = """
local waiting, cursor = KEYS[1] .. ARGV[1] .. ':waiting', KEYS[1] .. ARGV[1] .. ':cursor'
local number = string.match(ARGV[2], '^fut_%x+_(%d+)_%x+_')
redis.call('ZADD', waiting, number, ARGV[2])
redis.call('SET', cursor, '1', 'NX')
for _, key in ipairs({waiting, cursor}) do redis.call('EXPIRE', key, ARGV[3]) end
"""

# KEYS: the run's prefix. ARGV: name, the client's cursor, how many to look at, seconds to live.
# Answers nothing when nothing is known, else the cursor, then of each that has ended its state and its id.
_LOOK = """
local name = KEYS[1] .. ARGV[1]
local waiting, ended, cursor = name .. ':waiting', name .. ':ended', name .. ':cursor'
local at = redis.call('GET', cursor)
if not at or tonumber(at) < tonumber(ARGV[2]) then return {} end
redis.call('ZREMRANGEBYSCORE', ended, '-inf', ARGV[2])
for _, id in ipairs(redis.call('ZRANGE', waiting, 0, ARGV[3] - 1)) do
  local number, tag = string.match(id, '^fut_%x+_(%d+)_(%x+)_')
  local row = redis.call('HMGET', KEYS[1] .. 'e:' .. number, 'status', 'tag')
  local status = row[2] == tag and row[1] or 'failed'
  if status ~= 'pending' and status ~= 'running' then
    at = redis.call('INCR', cursor)
    redis.call('ZREM', waiting, id)
    redis.call('ZADD', ended, at, (status == 'completed' and 'finished' or 'failed') .. ' ' .. id)
    redis.call('EXPIRE', ended, ARGV[4])
  end
end
local out = {tostring(at)}
for _, one in ipairs(redis.call('ZRANGE', ended, 0, ARGV[3] - 1)) do table.insert(out, one) end
if #out > 1 then out[1] = redis.call('ZSCORE', ended, out[#out]) end
return out
"""


@dataclass(frozen=True)
class Seen:
    """What a look has found."""

    cursor: int
    ended: list[dict[str, Any]]


def note(sampler: SamplerRow, seq_id: int, request_id: str) -> None:
    """Note a sample that is to be told of; a repeat changes nothing that matters."""
    s = services()
    script = s.redis.register_script(_NOTE)
    name = _name(sampler, seq_id // COPY)
    args = (name, request_id, s.settings.result_ttl_s)
    script(keys=[keys.prefix(sampler.run_id)], args=args)


def wait(request: Mapping[str, Any]) -> dict[str, Any]:
    """What has ended past the client's cursor, held until something has or the poll's time is over.

    Raises SignalError not_found, too_many_waits, and future_expired when the server has lost what it knew:
    the client must not wait for it any longer.
    """
    target, seen_to = request["target"], request["prev_cursor"]
    sampler = samplers.own(target["sampling_session_id"])
    name = _name(sampler, target["cloned_sampler_id"])
    asked, most = request["timeout"], services().settings.max_poll_s
    seconds = most if asked is None else min(asked, most)
    found = _look(sampler, name, seen_to)
    if seconds == 0:
        found = found or Seen(seen_to, [])
    elif found is not None and not found.ended:
        found = _held(sampler, name, seen_to, seconds)
    if found is None:
        raise SignalError("future_expired", "Nothing is known of this client's samples.")
    return {"completions": found.ended, "cursor": found.cursor}


def _held(sampler: SamplerRow, name: str, seen_to: int, seconds: float) -> Seen | None:
    s, deadline, woken = services(), time.monotonic() + seconds, False
    with s.long_poll(), s.hub.watch(sampler.run_id) as event:
        while (found := _look(sampler, name, seen_to)) is not None and not found.ended:
            if woken:
                time.sleep(_PAUSE_S)
            if not event.wait(max(0.0, deadline - time.monotonic())):
                break
            woken = True
            event.clear()
    return found


def _look(sampler: SamplerRow, name: str, seen_to: int) -> Seen | None:
    s = services()
    args = (name, seen_to, _LOOKED_AT, s.settings.result_ttl_s)
    found = s.redis.register_script(_LOOK)(keys=[keys.prefix(sampler.run_id)], args=args)
    if not found:
        return None
    cursor, *ended = (one.decode() for one in found)
    return Seen(int(cursor), [_completion(*one.split(" ", 1)) for one in ended])


def _completion(state: str, request_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {"state": state, "request_id": request_id}
    if state == "finished":
        found["response_payload_uncompressed_size"] = _SAID_BYTES
    return found


def _name(sampler: SamplerRow, copy: int) -> str:
    return f"polled:{sampler.sampler_id}:{copy}"
