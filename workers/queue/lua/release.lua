-- Lets a held run go on. ARGV: the hold that must be on.
if not head('epoch') then return {'missing'} end
if (head('closed') or '') ~= '' then return {'closed', head('closed')} end
local on = head('hold') or ''
if on ~= ARGV[1] then return {'held', on, head('hold_info') or ''} end
redis.call('HSET', P .. 'head', 'hold', '', 'hold_info', '', 'activity', stamp(now()))
event('resumed', 'data', cjson.encode({from = on}))
redis.call('PUBLISH', 'sig:pool', RUN)
redis.call('PUBLISH', 'sig:done', RUN .. ':0')
return {'ok'}
