-- Holds a run: no operation is taken any more. ARGV: hold, info JSON. Another hold that is on stays.
if not head('epoch') then return {'missing'} end
if (head('closed') or '') ~= '' then return {'closed', head('closed')} end
local on = head('hold') or ''
if on ~= '' and on ~= ARGV[1] then return {'held', on, head('hold_info') or ''} end
-- A pause by its owner outlasts that of an idle run.
redis.call('HSET', P .. 'head', 'hold', ARGV[1], 'hold_info', ARGV[2])
if on == '' then
  if ARGV[1] ~= 'paused' then event(ARGV[1], 'data', ARGV[2]) end
  if ARGV[1] == 'paused' and (head('worker') or '') == '' then event('paused', 'data', ARGV[2]) end
end
redis.call('PUBLISH', 'sig:pool', RUN)
redis.call('PUBLISH', 'sig:done', RUN .. ':0')
return {'ok'}
