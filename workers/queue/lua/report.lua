-- The worker says that it holds the session. ARGV: epoch, device JSON, fingerprint JSON, rebuilt JSON (or ''),
-- the seq from which on its bits may differ from those before (or ''), state JSON.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
redis.call('HSET', P .. 'head', 'worker_state', 'ready', 'ever_ready', '1', 'device', ARGV[2],
  'fingerprint', ARGV[3], 'state', ARGV[6], 'activity', stamp(now()))
if ARGV[5] ~= '' then redis.call('HSET', P .. 'head', 'det_since', ARGV[5]) end
if ARGV[4] ~= '' then event('rebuilt', 'data', ARGV[4]) end
event('ready', 'data', ARGV[2])
redis.call('PUBLISH', 'sig:pool', RUN)
redis.call('PUBLISH', 'sig:done', RUN .. ':0')
return {'ok'}
