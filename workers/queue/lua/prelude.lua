-- Shared by all scripts of the journal. KEYS[1] is the run's prefix "sig:{run_id}:".
-- Keys: head (hash), e:<n> entry (hash), b:<n> body, r:<n> result, order (list: seq -> entry),
-- free (list of entries without a place in the order, waiting), flying (set: those being executed), refs (zset of
-- what they have in storage, by when it may go), open (set of unfinished entries), i:<key> idempotency key, lane:<name> (hash), lw:<name> (zset of waiting).
-- What is at or below head.base is sealed in segments (storage) and gone from here: `order` begins after it.
local P = KEYS[1]
local RUN = string.sub(P, 6, -3)

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function stamp(seconds) return string.format('%.6f', seconds) end

local function head(field) return redis.call('HGET', P .. 'head', field) end

local function entry(n, field) return redis.call('HGET', P .. 'e:' .. n, field) end

-- What an owner has queued in all runs together: {operations, bytes}.
local function load_key() return 'sig:load:' .. (head('owner') or '') end

local function base() return tonumber(head('base') or '0') end

local function event(kind, ...)
  redis.call('XADD', 'sig:commits', '*', 'type', kind, 'run', RUN, 'at', stamp(now()), ...)
end

-- Ends an entry: status, error, time; wakes who waits for it.
local function finish(n, status, err, at)
  redis.call('HSET', P .. 'e:' .. n, 'status', status, 'fin', stamp(at), 'err', err)
  if redis.call('SREM', P .. 'open', n) == 1 then
    local size = tonumber(entry(n, 'size') or '0')
    redis.call('HINCRBY', P .. 'head', 'queued_bytes', -size)
    redis.call('HINCRBY', load_key(), 'operations', -1)
    redis.call('HINCRBY', load_key(), 'bytes', -size)
  end
  -- One that never got its place in the order is in no segment.
  if not entry(n, 'seq') then
    local ttl = tonumber(head('ttl') or '86400')
    for _, key in ipairs({'e:', 'b:', 'r:'}) do redis.call('EXPIRE', P .. key .. n, ttl) end
    local refs = redis.call('HMGET', P .. 'e:' .. n, 'body', 'res')
    for _, ref in ipairs(refs) do
      if ref and ref ~= '' and ref ~= 'inline' then redis.call('ZADD', P .. 'refs', at + ttl, ref) end
    end
  end
  redis.call('ZREM', 'sig:deadlines', RUN .. '|' .. n)
  redis.call('PUBLISH', 'sig:done', RUN .. ':' .. n)
end

-- Gives an entry its place in the order, or lets one that needs none wait for any turn.
local function admit(n)
  if entry(n, 'free') then
    redis.call('RPUSH', P .. 'free', n)
    return
  end
  local seq = base() + redis.call('RPUSH', P .. 'order', n)
  redis.call('HSET', P .. 'e:' .. n, 'seq', seq)
end

-- Marks an entry as running, and gives what its worker is told: n, seq, kind, body_ref, body, sub, start, tokens,
-- doom_seq, tag, lane, cseq, digest.
local function begin(n, seq, doomed, at)
  local e = redis.call('HMGET', P .. 'e:' .. n, 'kind', 'body', 'sub', 'start', 'tok', 'tag', 'lane', 'cseq', 'digest')
  local start = e[4] or stamp(at)
  redis.call('HSET', P .. 'e:' .. n, 'status', 'running', 'start', start)
  local body = ''
  if e[2] == '' then body = redis.call('GET', P .. 'b:' .. n) or '' end
  return {n, seq, e[1], e[2], body, e[3], start, e[5], doomed, e[6], e[7], e[8], e[9]}
end

-- An optim_step that is queued behind a failed forward_backward must not step on half a batch.
local function doom(n, kind, status, seq)
  if kind == 'forward_backward' and status == 'failed' then
    -- What is appended once the failure is known is not doomed: it may have been noted before its turn.
    if head('doom_seq') == tostring(seq) then return end
    redis.call('HSET', P .. 'head', 'doom_upto', head('entries'), 'doom_seq', seq)
  elseif kind == 'optim_step' then
    redis.call('HDEL', P .. 'head', 'doom_upto', 'doom_seq')
  end
end

-- Ends every unfinished entry.
local function end_open(status, err, at)
  for _, n in ipairs(redis.call('SMEMBERS', P .. 'open')) do finish(n, status, err, at) end
end

-- The run stands still at this state until its owner has taken note; nothing waits behind it.
-- Without an event when a worker that lives is about to say to which state it goes back.
local function roll_back(at_seq, silent)
  redis.call('HSET', P .. 'head', 'hold', 'rolled_back', 'hold_info',
    string.format('{"at_seq":%d}', at_seq), 'rolled', '1')
  redis.call('HDEL', P .. 'head', 'running', 'bell', 'doom_upto', 'doom_seq')
  if not silent then event('rolled_back', 'data', string.format('{"at_seq":%d}', at_seq)) end
end

local function close(status, err, entry_status, entry_err)
  local at = now()
  end_open(entry_status, entry_err, at)
  redis.call('HSET', P .. 'head', 'closed', status, 'close_err', err, 'activity', stamp(at),
    'hold', '', 'hold_info', '', 'move', '')
  redis.call('HDEL', P .. 'head', 'running', 'bell')
  redis.call('DEL', P .. 'free', P .. 'flying')
  redis.call('SREM', 'sig:runs', RUN)
  event('closed', 'status', status, 'data', err)
  redis.call('PUBLISH', 'sig:pool', RUN)
end
