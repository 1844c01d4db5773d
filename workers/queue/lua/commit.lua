-- Ends the running entry, fenced by the epoch. ARGV: epoch, n, seq, status, result, result_ref, error,
-- data (JSON for the projector), state (JSON), close_status, record (JSON, what a replay
-- is compared with), tag.
-- Answers {'ok'}, {'done'} (this very commit was made before, its reply was lost), {'fenced'},
-- {'closed'}, {'missing'} (the journal is gone), or {'behind', applied} (it has lost commits of this worker's).
local epoch, n, seq, status = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
if not head('epoch') then return {'missing'} end
if head('epoch') ~= epoch then return {'fenced'} end
local applied = tonumber(head('applied') or '0')
if applied >= seq then return {'done'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if applied + 1 ~= seq or redis.call('LINDEX', P .. 'order', applied - base()) ~= n
  or entry(n, 'tag') ~= ARGV[12] then return {'behind', applied} end
local at = now()
local kind = entry(n, 'kind')
if ARGV[5] ~= '' or ARGV[6] ~= '' then
  redis.call('HSET', P .. 'e:' .. n, 'res', ARGV[6] ~= '' and ARGV[6] or 'inline')
end
if ARGV[5] ~= '' then redis.call('SET', P .. 'r:' .. n, ARGV[5]) end
redis.call('HSET', P .. 'e:' .. n, 'rec', ARGV[11])
redis.call('HINCRBY', P .. 'head', 'unsealed', #ARGV[5])
finish(n, status, ARGV[7], at)
redis.call('HSET', P .. 'head', 'applied', seq, 'state', ARGV[9], 'activity', stamp(at))
redis.call('HDEL', P .. 'head', 'running')
doom(n, kind, status, seq)
event('commit', 'seq', seq, 'entry', n, 'kind', kind, 'status', status, 'data', ARGV[8])
if ARGV[10] ~= '' then
  close(ARGV[10], '', 'failed',
    '{"code":"run_closed","message":"The run ended before this operation.","retryable":false}')
end
return {'ok'}
