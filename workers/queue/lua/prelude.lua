-- Shared by all scripts of the journal. KEYS[1] is the run's prefix "sig:{run_id}:".
-- Keys: head (hash), e:<n> entry (hash), b:<n> body, r:<n> result, order (list: seq -> entry),
-- open (set of unfinished entries), idem (hash), lane:<name> (hash), lw:<name> (zset of waiting).
local P = KEYS[1]
local RUN = string.sub(P, 6, -3)

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function stamp(seconds) return string.format('%.6f', seconds) end

local function head(field) return redis.call('HGET', P .. 'head', field) end

local function entry(n, field) return redis.call('HGET', P .. 'e:' .. n, field) end

local function event(kind, ...)
  redis.call('XADD', 'sig:commits', '*', 'type', kind, 'run', RUN, 'at', stamp(now()), ...)
end

-- Ends an entry: status, error, time; wakes who waits for it.
local function finish(n, status, err, at)
  redis.call('HSET', P .. 'e:' .. n, 'status', status, 'fin', stamp(at), 'err', err)
  redis.call('SREM', P .. 'open', n)
  redis.call('ZREM', 'sig:deadlines', RUN .. '|' .. n)
  redis.call('PUBLISH', 'sig:done', RUN .. ':' .. n)
end

-- Gives an entry its place in the order.
local function admit(n)
  local seq = redis.call('RPUSH', P .. 'order', n)
  redis.call('HSET', P .. 'e:' .. n, 'seq', seq)
  return seq
end

-- An optim_step that is queued behind a failed forward_backward must not step on half a batch.
local function doom(n, kind, status, seq)
  if kind == 'forward_backward' and status == 'failed' then
    redis.call('HSET', P .. 'head', 'doom_upto', head('entries'), 'doom_seq', seq)
  elseif kind == 'optim_step' then
    redis.call('HDEL', P .. 'head', 'doom_upto', 'doom_seq')
  end
end

local function close(status, err, entry_status, entry_err)
  local at = now()
  for _, n in ipairs(redis.call('SMEMBERS', P .. 'open')) do
    finish(n, entry_status, entry_err, at)
  end
  redis.call('HSET', P .. 'head', 'closed', status, 'close_err', err, 'activity', stamp(at))
  redis.call('HDEL', P .. 'head', 'running', 'bell')
  redis.call('SREM', 'sig:runs', RUN)
  event('closed', 'status', status, 'data', err)
  redis.call('PUBLISH', 'sig:pool', RUN)
end
