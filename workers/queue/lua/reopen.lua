-- Makes a lost journal anew, at a state that storage or a worker still has. The run is held as rolled back.
-- ARGV: owner, result_ttl_s, epoch, worker, applied, base, entries, the seq that it will stand at once a living worker
-- has put back what it knows.
if redis.call('EXISTS', P .. 'head') == 1 then return {'exists'} end
-- What may be left of the old one would be taken for its own.
redis.call('DEL', P .. 'order', P .. 'open', P .. 'free', P .. 'flying')
redis.call('HSET', P .. 'head', 'owner', ARGV[1], 'ttl', ARGV[2], 'epoch', ARGV[3], 'entries', ARGV[7],
  'applied', ARGV[5], 'base', ARGV[6], 'closed', '', 'close_err', '', 'state', '{}', 'worker', ARGV[4],
  'worker_state', ARGV[4] ~= '' and 'ready' or '', 'device', '', 'hold', '', 'hold_info', '', 'move', '',
  'activity', stamp(now()))
redis.call('SADD', 'sig:runs', RUN)
roll_back(tonumber(ARGV[8]), ARGV[4] ~= '')
redis.call('PUBLISH', 'sig:pool', RUN)
return {'ok'}
