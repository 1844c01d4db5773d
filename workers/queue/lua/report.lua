-- The worker says that it holds the session. ARGV: epoch, info JSON.
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
redis.call('HSET', P .. 'head', 'worker_state', 'ready', 'device', ARGV[2])
event('ready', 'data', ARGV[2])
redis.call('PUBLISH', 'sig:pool', RUN)
return {'ok'}
