-- Asks that the run leave a slot. ARGV: "host/slot", or '' to take the wish back.
if not head('epoch') then return {'missing'} end
if (head('closed') or '') ~= '' then return {'closed'} end
redis.call('HSET', P .. 'head', 'move', ARGV[1])
redis.call('PUBLISH', 'sig:pool', RUN)
return {'ok'}
