-- The entry of a seq behind those that are being executed, marked as running, if it is a sample that can begin
-- now. ARGV: epoch, seq. Answers as `take`, {'empty'}, {'held'}, {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if (head('hold') or '') ~= '' then return {'held'} end
local seq, at = tonumber(ARGV[2]), now()
local n = redis.call('LINDEX', P .. 'order', seq - 1 - base())
if not n then return {'empty'} end
local e = redis.call('HMGET', P .. 'e:' .. n, 'status', 'kind', 'dl')
if e[1] ~= 'pending' or e[2] ~= 'sample' or tonumber(e[3]) < at then return {'empty'} end
return {'entry', unpack(begin(n, seq, '', at))}
