-- Installs the epoch of a lease: compare-greater, so an older lease can never come back.
-- ARGV: epoch, worker, device JSON.
local closed = head('closed')
if not closed then return {'missing'} end
if closed ~= '' then return {'closed'} end
if tonumber(ARGV[1]) <= tonumber(head('epoch')) then return {'stale', head('epoch')} end
local state = head('ever_ready') and 'rebuilding' or 'loading'
redis.call('HSET', P .. 'head', 'epoch', ARGV[1], 'worker', ARGV[2], 'worker_state', state, 'device', ARGV[3],
  'activity', stamp(now()))
redis.call('HDEL', P .. 'head', 'running', 'bell')
-- What an earlier worker was executing out of order is executed again.
for _, n in ipairs(redis.call('SMEMBERS', P .. 'flying')) do
  if entry(n, 'status') == 'running' then
    redis.call('HSET', P .. 'e:' .. n, 'status', 'pending')
    redis.call('LPUSH', P .. 'free', n)
  end
end
redis.call('DEL', P .. 'flying')
event('placed', 'status', state, 'data', ARGV[3])
return {'ok'}
