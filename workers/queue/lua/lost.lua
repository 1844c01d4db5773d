-- The agent's word that the worker of an epoch is gone. ARGV: epoch, why, '1' to blame the running entry,
-- how often an entry may be blamed, error JSON of one that was blamed too often. Where no entry in order ran,
-- each of those is blamed that were executed out of order.
if not head('epoch') then return {'missing'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if head('epoch') ~= ARGV[1] then return {'stale'} end
local n, seq, crashes = head('running'), cjson.null, 0
if n then seq = tonumber(entry(n, 'seq')) end
if n and ARGV[3] == '1' then
  crashes = redis.call('HINCRBY', P .. 'e:' .. n, 'crashes', 1)
  if crashes >= tonumber(ARGV[4]) and entry(n, 'status') == 'running' then
    finish(n, 'failed', ARGV[5], now())
    doom(n, entry(n, 'kind'), 'failed', seq)
  end
end
local blamed = ARGV[3] == '1' and n ~= false
if ARGV[3] == '1' and not n then
  for _, m in ipairs(redis.call('SMEMBERS', P .. 'flying')) do
    blamed = true
    local count = redis.call('HINCRBY', P .. 'e:' .. m, 'crashes', 1)
    crashes = math.max(crashes, count)
    if count >= tonumber(ARGV[4]) and entry(m, 'status') == 'running' then finish(m, 'failed', ARGV[5], now()) end
  end
end
redis.call('HSET', P .. 'head', 'worker', '', 'worker_state', head('ever_ready') and 'rebuilding' or '')
redis.call('HDEL', P .. 'head', 'running', 'bell')
event('worker_lost', 'data', cjson.encode({why = ARGV[2], blamed = blamed,
  running_seq = seq, crashes = crashes}))
redis.call('PUBLISH', 'sig:done', RUN .. ':0')
return {'ok', crashes}
