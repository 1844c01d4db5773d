-- The next eligible entry, marked as running. ARGV: epoch, '1' when the worker goes on listening (the
-- bell then stays taken, so that nobody sends a message). Entries that ended before their turn
-- (cancelled, past their deadline) are passed over in order.
-- Answers {'entry', what `begin` gives},
-- {'empty'}, {'held'}, {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if (head('hold') or '') ~= '' then
  redis.call('HDEL', P .. 'head', 'bell')
  return {'held'}
end
local applied, first = tonumber(head('applied') or '0'), base()
local at = now()
while true do
  local n = redis.call('LINDEX', P .. 'order', applied - first)
  if not n then
    -- With something left to do out of order the bell stays taken.
    if ARGV[2] ~= '1' and redis.call('LLEN', P .. 'free') == 0 then redis.call('HDEL', P .. 'head', 'bell') end
    return {'empty'}
  end
  local seq = applied + 1
  local e = redis.call('HMGET', P .. 'e:' .. n, 'status', 'kind', 'dl', 'on_error')
  local status, kind = e[1], e[2]
  if status == 'pending' and tonumber(e[3]) < at then
    finish(n, 'failed', '{"code":"deadline_exceeded","message":"The operation did not begin before its deadline.","retryable":false}', at)
    status = 'failed'
  end
  if status == 'pending' or status == 'running' then
    redis.call('HSET', P .. 'head', 'running', n)
    local doomed = ''
    if kind == 'optim_step' and e[4] ~= 'continue' and tonumber(n) <= tonumber(head('doom_upto') or '-1') then
      doomed = head('doom_seq')
    end
    return {'entry', unpack(begin(n, seq, doomed, at))}
  end
  applied = seq
  redis.call('HSET', P .. 'head', 'applied', applied)
  doom(n, kind, status, seq)
  event('commit', 'seq', seq, 'entry', n, 'kind', kind, 'status', status, 'data', '{}')
end
