-- Cancels one entry. ARGV: n, error JSON. Answers {'cancelled'|'stopping'|'already_running'|'finished', status}.
local n = ARGV[1]
local status = entry(n, 'status')
if not status then return {'missing'} end
if status == 'pending' then
  finish(n, 'cancelled', ARGV[2], now())
  return {'cancelled'}
end
if status == 'running' then
  if entry(n, 'kind') ~= 'sample' then return {'already_running'} end
  redis.call('HSET', P .. 'e:' .. n, 'stop', '1')
  return {'stopping'}
end
return {'finished', status}
