-- Entries without a place in the order, the oldest first, marked as running. ARGV: epoch, at most so many.
-- Answers {'entries', then per entry: n, kind, body_ref, body, sub, start, tokens, tag, lane, cseq, digest},
-- {'held'}, {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if (head('hold') or '') ~= '' then return {'held'} end
local at, out, left = now(), {'entries'}, tonumber(ARGV[2])
while left > 0 do
  local n = redis.call('LPOP', P .. 'free')
  if not n then break end
  local e = redis.call('HMGET', P .. 'e:' .. n, 'status', 'kind', 'dl', 'body', 'sub', 'start', 'tok', 'tag', 'lane',
    'cseq', 'digest')
  if e[1] == 'pending' and tonumber(e[3]) < at then
    finish(n, 'failed', '{"code":"deadline_exceeded","message":"The operation did not begin before its deadline.","retryable":false}', at)
  elseif e[1] == 'pending' then
    local start = e[6] or stamp(at)
    redis.call('HSET', P .. 'e:' .. n, 'status', 'running', 'start', start)
    redis.call('SADD', P .. 'flying', n)
    local body = ''
    if e[4] == '' then body = redis.call('GET', P .. 'b:' .. n) or '' end
    for _, v in ipairs({n, e[2], e[4], body, e[5], start, e[7], e[8], e[9], e[10], e[11]}) do table.insert(out, v) end
    left = left - 1
  end
end
return out
