-- What `take` would come to, without taking it. ARGV: epoch.
-- Answers {'entry', kind, tokens}, {'empty'}, {'held'}, {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if (head('hold') or '') ~= '' then return {'held'} end
local n = redis.call('LINDEX', P .. 'order', tonumber(head('applied') or '0') - base())
if not n then return {'empty'} end
return {'entry', entry(n, 'kind') or '', entry(n, 'tok') or '0'}
