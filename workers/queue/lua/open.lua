-- Makes the journal of a run; a second call changes nothing. ARGV: owner, result_ttl_s.
if redis.call('EXISTS', P .. 'head') == 1 then return {'exists'} end
redis.call('HSET', P .. 'head', 'owner', ARGV[1], 'ttl', ARGV[2], 'epoch', '0', 'entries', '0',
  'applied', '0', 'base', '0', 'closed', '', 'close_err', '', 'state', '{}', 'worker', '',
  'worker_state', '', 'device', '', 'hold', '', 'hold_info', '', 'move', '', 'activity', stamp(now()))
redis.call('SADD', 'sig:runs', RUN)
redis.call('PUBLISH', 'sig:pool', RUN)
return {'ok'}
