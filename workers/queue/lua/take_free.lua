-- Entries without a place in the order, the oldest first, marked as running. ARGV: epoch, at most so many.
-- Answers {'entries', then per entry what `begin` gives, with seq 0},
-- {'held'}, {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if (head('hold') or '') ~= '' then return {'held'} end
local at, out, left = now(), {'entries'}, tonumber(ARGV[2])
while left > 0 do
  local n = redis.call('LPOP', P .. 'free')
  if not n then break end
  local e = redis.call('HMGET', P .. 'e:' .. n, 'status', 'dl')
  if e[1] == 'pending' and tonumber(e[2]) < at then
    finish(n, 'failed', '{"code":"deadline_exceeded","message":"The operation did not begin before its deadline.","retryable":false}', at)
  elseif e[1] == 'pending' then
    redis.call('SADD', P .. 'flying', n)
    for _, v in ipairs(begin(n, 0, '', at)) do table.insert(out, v) end
    left = left - 1
  end
end
return out
