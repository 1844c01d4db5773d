-- The agent's word that the worker of an epoch has let go of a living run. ARGV: epoch.
if not head('epoch') then return {'missing'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if head('epoch') ~= ARGV[1] then return {'stale'} end
redis.call('HSET', P .. 'head', 'worker', '', 'worker_state', '')
redis.call('HDEL', P .. 'head', 'running', 'bell')
local hold, move = head('hold') or '', head('move') or ''
if hold == 'paused' then event('paused', 'data', head('hold_info')) end
if move ~= '' then event('moved', 'data', cjson.encode({from = move})) end
redis.call('HSET', P .. 'head', 'move', '')
redis.call('PUBLISH', 'sig:done', RUN .. ':0')
return {'ok'}
