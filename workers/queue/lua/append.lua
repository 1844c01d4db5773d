-- Appends entries, all or none. ARGV: max_queued, max_bytes (per run), user_operations, user_bytes,
-- max_unsealed, gap_deadline_s, op_deadline_s, idem_key, idem_digest, idem_ttl_s, tag, count, then per entry:
-- kind, body, body_ref, tokens, lane, client_seq, on_error, digest, size, free ('1': without a place in the order),
-- refused (error JSON of one that takes its place and ends at once, or '').
-- Answers {'ok', ring, appended…, '|', admitted…}: appended = n,seq,status,replayed,submitted,applied,tag;
-- admitted = n,kind.
local max_queued, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local user_operations, user_bytes, max_unsealed = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local gap_s, deadline_s = tonumber(ARGV[6]), tonumber(ARGV[7])
local idem, idem_digest, idem_ttl, tag, count = ARGV[8], ARGV[9], ARGV[10], ARGV[11], tonumber(ARGV[12])
local WIDTH = 11

local function arg(i, j) return ARGV[12 + (i - 1) * WIDTH + j] end

local function is_free(i) return arg(i, 10) == '1' end

-- What has no place in the order is only told apart by its client_seq: no gap in it means anything.
local function lane_key(i) return P .. (is_free(i) and 'ulane:' or 'lane:') .. arg(i, 5) end

-- `given` is the tag, for an entry that is in a segment by now.
local function known(n, replayed, given)
  local row = redis.call('HMGET', P .. 'e:' .. n, 'seq', 'status', 'sub', 'tag')
  return {n, row[1] or '', row[2] or '', replayed, row[3] or '0', head('applied') or '0', row[4] or given or ''}
end

if redis.call('EXISTS', P .. 'head') == 0 then return {'missing'} end

if idem ~= '' then
  local found = redis.call('GET', P .. 'i:' .. idem)
  if found then
    local first, n, given, digest = string.match(found, '^(%d+),(%d+),(%x+),(.*)$')
    if digest ~= idem_digest or tonumber(n) ~= count then return {'idempotency_conflict'} end
    local out = {'ok', '0'}
    for i = 0, count - 1 do
      for _, v in ipairs(known(tostring(tonumber(first) + i), '1', given)) do table.insert(out, v) end
    end
    table.insert(out, '|')
    return out
  end
end

-- First look at everything, then write: a refused batch leaves no trace.
local replays, given_tags, fresh, fresh_bytes, seen = {}, {}, 0, 0, {}
for i = 1, count do
  local lane, cseq = arg(i, 5), arg(i, 6)
  if lane ~= '' then
    local have = redis.call('HGET', lane_key(i), 'm:' .. cseq)
    if have then
      local number, given, digest = string.match(have, '^(%d+),(%x+),(.*)$')
      if digest ~= string.sub(arg(i, 8), 1, 32) then return {'client_seq_conflict', i} end
      replays[i], given_tags[i] = number, given
    else
      local name = lane_key(i) .. '|' .. cseq
      if seen[name] then return {'client_seq_conflict', i} end
      seen[name] = true
      local next_seq = tonumber(redis.call('HGET', lane_key(i), 'next') or '1')
      if not is_free(i) and tonumber(cseq) < next_seq then return {'sequence_gap', i} end
    end
  end
  if not replays[i] then
    fresh, fresh_bytes = fresh + 1, fresh_bytes + tonumber(arg(i, 9))
  end
end

if fresh > 0 then
  local closed = head('closed')
  if closed and closed ~= '' then return {'closed', closed, head('close_err') or ''} end
  local hold = head('hold') or ''
  if hold == 'paused' and string.find(head('hold_info') or '', '"idle"', 1, true) then
    redis.call('HSET', P .. 'head', 'hold', '', 'hold_info', '')
    event('resumed', 'data', '{"by":"an operation"}')
    redis.call('PUBLISH', 'sig:pool', RUN)
  elseif hold ~= '' then
    return {'held', hold, head('hold_info') or ''}
  end
  local open = redis.call('SCARD', P .. 'open')
  if open + fresh > max_queued then return {'queue_full', open, 'run'} end
  local mine = redis.call('HMGET', load_key(), 'operations', 'bytes')
  local operations, bytes = tonumber(mine[1] or '0'), tonumber(mine[2] or '0')
  if operations + fresh > user_operations or bytes + fresh_bytes > user_bytes then
    return {'queue_full', operations, 'user'}
  end
  -- One operation of any size fits an empty queue.
  local queued = tonumber(head('queued_bytes') or '0')
  if open > 0 and queued + fresh_bytes > max_bytes then return {'queue_full', open, 'run'} end
  if open > 0 and tonumber(head('unsealed') or '0') + fresh_bytes > max_unsealed then
    return {'queue_full', open, 'unsealed'}
  end
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
      'lane', lane, 'cseq', cseq, 'dl', stamp(at + deadline_s), 'tag', tag, 'size', arg(i, 9))
    if is_free(i) then redis.call('HSET', P .. 'e:' .. n, 'free', '1') end
    if arg(i, 3) == '' then
      redis.call('SET', P .. 'b:' .. n, arg(i, 2))
      if not is_free(i) then redis.call('HINCRBY', P .. 'head', 'unsealed', #arg(i, 2)) end
    end
    redis.call('SADD', P .. 'open', n)
    redis.call('HINCRBY', P .. 'head', 'queued_bytes', arg(i, 9))
    redis.call('HINCRBY', load_key(), 'operations', 1)
    redis.call('HINCRBY', load_key(), 'bytes', arg(i, 9))
    redis.call('ZADD', 'sig:deadlines', at + deadline_s, RUN .. '|' .. n)
    if lane ~= '' then
      redis.call('HSET', lane_key(i), 'm:' .. cseq, n .. ',' .. tag .. ',' .. string.sub(arg(i, 8), 1, 32))
    end
    if is_free(i) and lane ~= '' then redis.call('EXPIRE', lane_key(i), head('ttl') or '86400') end
    if lane == '' or is_free(i) then
      admit_now(n)
    else
      redis.call('ZADD', P .. 'lw:' .. lane, cseq, n)
      -- A lane's earlier gap has been filled or a later entry waits: the gap's clock starts anew.
      local before = redis.call('HGET', P .. 'lane:' .. lane, 'next') or '1'
      advance(lane)
      local after = redis.call('HGET', P .. 'lane:' .. lane, 'next')
      if before ~= after and redis.call('ZCARD', P .. 'lw:' .. lane) > 0 then
        redis.call('ZADD', 'sig:gaps', at + gap_s, RUN .. '|' .. lane)
      end
    end
    if arg(i, 11) ~= '' then finish(n, 'failed', arg(i, 11), at) end
  end
end

if idem ~= '' and fresh == count then
  redis.call('SET', P .. 'i:' .. idem, numbers[1] .. ',' .. count .. ',' .. tag .. ',' .. idem_digest, 'EX', idem_ttl)
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
  for _, v in ipairs(known(numbers[i], replays[i] and '1' or '0', given_tags[i])) do table.insert(out, v) end
end
table.insert(out, '|')
for _, v in ipairs(admitted) do table.insert(out, v) end
return out
