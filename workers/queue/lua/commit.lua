-- Ends the running entry, fenced by the epoch. ARGV: epoch, n, seq, status, result, result_ref, error,
-- data (JSON for the projector), state (JSON), result_ttl_s, close_status.
-- Answers {'ok'}, {'done'} (this very commit was made before, its reply was lost), {'fenced'},
-- {'closed'}, or {'behind', applied} (the store has lost commits that this worker made).
local epoch, n, seq, status = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
if head('epoch') ~= epoch then return {'fenced'} end
local applied = tonumber(head('applied') or '0')
if applied >= seq then return {'done'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if applied + 1 ~= seq then return {'behind', applied} end
local at = now()
local kind = entry(n, 'kind')
if ARGV[5] ~= '' or ARGV[6] ~= '' then
  redis.call('HSET', P .. 'e:' .. n, 'res', ARGV[6] ~= '' and ARGV[6] or 'inline')
end
if ARGV[5] ~= '' then redis.call('SET', P .. 'r:' .. n, ARGV[5], 'EX', ARGV[10]) end
finish(n, status, ARGV[7], at)
redis.call('HSET', P .. 'head', 'applied', seq, 'state', ARGV[9], 'activity', stamp(at))
redis.call('HDEL', P .. 'head', 'running', 'stop')
doom(n, kind, status, seq)
event('commit', 'seq', seq, 'entry', n, 'kind', kind, 'status', status, 'data', ARGV[8])
if ARGV[11] ~= '' then
  close(ARGV[11], '', 'failed',
    '{"code":"run_closed","message":"The run ended before this operation.","retryable":false}')
end
return {'ok'}
