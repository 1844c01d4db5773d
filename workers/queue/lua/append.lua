-- Appends entries, all or none. ARGV: max_queued, gap_deadline_s, op_deadline_s, idem_key, idem_digest,
-- count, then per entry: kind, body, body_ref, tokens, lane, client_seq, on_error, digest.
-- Answers {'ok', ring, appended…, '|', admitted…}: appended = n,seq,status,replayed,submitted,applied;
-- admitted = n,kind.
local max_queued, gap_s, deadline_s = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local idem, idem_digest, count = ARGV[4], ARGV[5], tonumber(ARGV[6])
local WIDTH = 8

local function arg(i, j) return ARGV[6 + (i - 1) * WIDTH + j] end

local function known(n, replayed)
  local row = redis.call('HMGET', P .. 'e:' .. n, 'seq', 'status', 'sub')
  return {n, row[1] or '', row[2] or '', replayed, row[3] or '0', head('applied') or '0'}
end

if redis.call('EXISTS', P .. 'head') == 0 then return {'missing'} end

if idem ~= '' then
  local found = redis.call('HGET', P .. 'idem', idem)
  if found then
    local first, n, digest = string.match(found, '^(%d+),(%d+),(.*)$')
    if digest ~= idem_digest or tonumber(n) ~= count then return {'idempotency_conflict'} end
    local out = {'ok', '0'}
    for i = 0, count - 1 do
      for _, v in ipairs(known(tostring(tonumber(first) + i), '1')) do table.insert(out, v) end
    end
    table.insert(out, '|')
    return out
  end
end

-- First look at everything, then write: a refused batch leaves no trace.
local replays, fresh, seen = {}, 0, {}
for i = 1, count do
  local lane, cseq = arg(i, 5), arg(i, 6)
  if lane ~= '' then
    local have = redis.call('HGET', P .. 'lane:' .. lane, 'm:' .. cseq)
    if have then
      if entry(have, 'digest') ~= arg(i, 8) then return {'client_seq_conflict', i} end
      replays[i] = have
    else
      if seen[lane .. '|' .. cseq] then return {'client_seq_conflict', i} end
      seen[lane .. '|' .. cseq] = true
      local next_seq = tonumber(redis.call('HGET', P .. 'lane:' .. lane, 'next') or '1')
      if tonumber(cseq) < next_seq then return {'sequence_gap', i} end
    end
  end
  if not replays[i] then fresh = fresh + 1 end
end

if fresh > 0 then
  local closed = head('closed')
  if closed and closed ~= '' then return {'closed', closed, head('close_err') or ''} end
  local open = redis.call('SCARD', P .. 'open')
  if open + fresh > max_queued then return {'queue_full', open} end
end

local at = now()
local admitted, numbers = {}, {}

local function admit_now(n)
  admit(n)
  table.insert(admitted, n)
  table.insert(admitted, entry(n, 'kind'))
end

-- Entries of a lane become eligible only after their predecessor in the lane.
local function advance(lane)
  local key, waiting = P .. 'lane:' .. lane, P .. 'lw:' .. lane
  local next_seq = tonumber(redis.call('HGET', key, 'next') or '1')
  while true do
    local first = redis.call('ZRANGE', waiting, 0, 0, 'WITHSCORES')
    if #first == 0 or tonumber(first[2]) ~= next_seq then break end
    redis.call('ZREM', waiting, first[1])
    admit_now(first[1])
    next_seq = next_seq + 1
  end
  redis.call('HSET', key, 'next', string.format('%d', next_seq))
  if redis.call('ZCARD', waiting) == 0 then
    redis.call('ZREM', 'sig:gaps', RUN .. '|' .. lane)
  else
    redis.call('ZADD', 'sig:gaps', 'NX', at + gap_s, RUN .. '|' .. lane)
  end
end

for i = 1, count do
  if replays[i] then
    numbers[i] = replays[i]
  else
    local n = tostring(redis.call('HINCRBY', P .. 'head', 'entries', 1))
    local lane, cseq = arg(i, 5), arg(i, 6)
    numbers[i] = n
    redis.call('HSET', P .. 'e:' .. n, 'kind', arg(i, 1), 'status', 'pending', 'sub', stamp(at),
      'tok', arg(i, 4), 'body', arg(i, 3), 'on_error', arg(i, 7), 'digest', arg(i, 8),
      'lane', lane, 'cseq', cseq, 'dl', stamp(at + deadline_s))
    if arg(i, 3) == '' then redis.call('SET', P .. 'b:' .. n, arg(i, 2)) end
    redis.call('SADD', P .. 'open', n)
    redis.call('ZADD', 'sig:deadlines', at + deadline_s, RUN .. '|' .. n)
    if lane == '' then
      admit_now(n)
    else
      redis.call('HSET', P .. 'lane:' .. lane, 'm:' .. cseq, n)
      redis.call('ZADD', P .. 'lw:' .. lane, cseq, n)
      -- A lane's earlier gap has been filled or a later entry waits: the gap's clock starts anew.
      local before = redis.call('HGET', P .. 'lane:' .. lane, 'next') or '1'
      advance(lane)
      local after = redis.call('HGET', P .. 'lane:' .. lane, 'next')
      if before ~= after and redis.call('ZCARD', P .. 'lw:' .. lane) > 0 then
        redis.call('ZADD', 'sig:gaps', at + gap_s, RUN .. '|' .. lane)
      end
    end
  end
end

if idem ~= '' and fresh == count then
  redis.call('HSET', P .. 'idem', idem, numbers[1] .. ',' .. count .. ',' .. idem_digest)
end
redis.call('HSET', P .. 'head', 'activity', stamp(at))

local ring = '0'
if #admitted > 0 then
  if redis.call('HSETNX', P .. 'head', 'bell', '1') == 1 then ring = '1' end
  -- For a worker that still listens after its last operation.
  if redis.call('LLEN', P .. 'ring') == 0 then redis.call('LPUSH', P .. 'ring', '1') end
  redis.call('PEXPIRE', P .. 'ring', 1000)
end
local out = {'ok', ring}
for i = 1, count do
  for _, v in ipairs(known(numbers[i], replays[i] and '1' or '0')) do table.insert(out, v) end
end
table.insert(out, '|')
for _, v in ipairs(admitted) do table.insert(out, v) end
return out
