-- Makes the journal of a run; a second call changes nothing. ARGV: generation, owner.
if redis.call('EXISTS', P .. 'head') == 1 then return {'exists'} end
redis.call('HSET', P .. 'head', 'gen', ARGV[1], 'owner', ARGV[2], 'epoch', '0', 'entries', '0',
  'applied', '0', 'closed', '', 'close_err', '', 'state', '{}', 'worker', '', 'worker_state', '',
  'device', '', 'activity', stamp(now()))
redis.call('SADD', 'sig:runs', RUN)
redis.call('PUBLISH', 'sig:pool', RUN)
return {'ok'}
