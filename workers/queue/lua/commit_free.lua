-- Ends an entry that has no place in the order, fenced by the epoch. ARGV: epoch, n, tag, status, result, result_ref,
-- error. Answers {'ok'}, {'done'} (it has ended: this very commit was made before, or
-- nobody waits for it any more), {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
local n = ARGV[2]
redis.call('SREM', P .. 'flying', n)
if entry(n, 'tag') ~= ARGV[3] or entry(n, 'status') ~= 'running' then return {'done'} end
if ARGV[5] ~= '' or ARGV[6] ~= '' then
  redis.call('HSET', P .. 'e:' .. n, 'res', ARGV[6] ~= '' and ARGV[6] or 'inline')
end
local at = now()
if ARGV[5] ~= '' then redis.call('SET', P .. 'r:' .. n, ARGV[5]) end
redis.call('HSET', P .. 'head', 'activity', stamp(at))
finish(n, ARGV[4], ARGV[7], at)
return {'ok'}
