-- Ends what waited too long. ARGV: 'gap', lane, error JSON, gap_deadline_s  or  'deadline', n, error JSON.
local at = now()
if ARGV[1] == 'deadline' then
  local n = ARGV[2]
  redis.call('ZREM', 'sig:deadlines', RUN .. '|' .. n)
  if entry(n, 'status') ~= 'pending' then return {'none'} end
  finish(n, 'failed', ARGV[3], at)
  return {'ok', 1}
end
-- The entries behind a gap fail; the lane goes on after the last of them.
local lane = ARGV[2]
local member, waiting = RUN .. '|' .. lane, P .. 'lw:' .. lane
local score = redis.call('ZSCORE', 'sig:gaps', member)
if not score or tonumber(score) > at then return {'none'} end
redis.call('ZREM', 'sig:gaps', member)
local ended = 0
local rows = redis.call('ZRANGE', waiting, 0, -1, 'WITHSCORES')
for i = 1, #rows, 2 do
  if entry(rows[i], 'status') == 'pending' then
    finish(rows[i], 'failed', ARGV[3], at)
    ended = ended + 1
  end
  redis.call('HSET', P .. 'lane:' .. lane, 'next', string.format('%d', tonumber(rows[i + 1]) + 1))
end
redis.call('DEL', waiting)
return {'ok', ended}
