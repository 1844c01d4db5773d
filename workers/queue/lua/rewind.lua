-- The journal has lost commits: what a worker or a snapshot still knows is put back, and the run is held.
-- ARGV: epoch, the seq that the worker's state is at, the seq up to which nothing is put back (what lies before
-- is in segments or gone), error JSON of what cannot be kept, count, then per entry: seq, n, its fields as JSON,
-- body, result. A state before `applied` means that what led from it to there is lost: the run goes back to it.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
local state_seq, known_from, at = tonumber(ARGV[2]), tonumber(ARGV[3]), now()
local applied = tonumber(head('applied'))
end_open('failed', ARGV[4], at)
redis.call('DEL', P .. 'free', P .. 'flying')
if state_seq < applied then
  redis.call('DEL', P .. 'order')
  redis.call('HSET', P .. 'head', 'base', string.format('%d', state_seq),
    'applied', string.format('%d', state_seq))
  applied = state_seq
elseif state_seq > applied then
  if known_from > applied then
    -- Nothing links what is here to what is put back.
    redis.call('DEL', P .. 'order')
    redis.call('HSET', P .. 'head', 'base', string.format('%d', known_from))
  elseif applied - base() > 0 then
    redis.call('LTRIM', P .. 'order', 0, applied - base() - 1)
  else
    redis.call('DEL', P .. 'order')
  end
  for i = 1, tonumber(ARGV[5]) do
    local o = 5 + (i - 1) * 5
    local seq, n = tonumber(ARGV[o + 1]), ARGV[o + 2]
    if seq > applied and seq > known_from then
      redis.call('RPUSH', P .. 'order', n)
      redis.call('DEL', P .. 'e:' .. n)
      for field, value in pairs(cjson.decode(ARGV[o + 3])) do
        redis.call('HSET', P .. 'e:' .. n, field, value)
      end
      if ARGV[o + 4] ~= '' then redis.call('SET', P .. 'b:' .. n, ARGV[o + 4]) end
      if ARGV[o + 5] ~= '' then redis.call('SET', P .. 'r:' .. n, ARGV[o + 5]) end
      local lane, cseq = entry(n, 'lane') or '', tonumber(entry(n, 'cseq') or '')
      if lane ~= '' and cseq then
        redis.call('HSET', P .. 'lane:' .. lane, 'm:' .. string.format('%d', cseq), n .. ',' .. entry(n, 'tag') .. ',' .. string.sub(entry(n, 'digest'), 1, 32),
          'next', string.format('%d', cseq + 1))
      end
      if tonumber(n) > tonumber(head('entries')) then redis.call('HSET', P .. 'head', 'entries', n) end
      event('commit', 'seq', seq, 'entry', n, 'kind', entry(n, 'kind'), 'status', entry(n, 'status'),
        'data', entry(n, 'data') or '{}')
      redis.call('HDEL', P .. 'e:' .. n, 'data')
      redis.call('PUBLISH', 'sig:done', RUN .. ':' .. n)
    end
  end
  redis.call('HSET', P .. 'head', 'applied', string.format('%d', state_seq))
end
roll_back(math.max(state_seq, applied))
redis.call('PUBLISH', 'sig:pool', RUN)
redis.call('PUBLISH', 'sig:done', RUN .. ':0')
return {'ok'}
