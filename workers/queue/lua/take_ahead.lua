-- The entry of a seq behind those that are being executed, marked as running, if it is a sample that can begin
-- now. ARGV: epoch, seq. Answers as `take`, {'empty'}, {'held'}, {'fenced'}, {'closed'}, {'missing'}.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
if (head('closed') or '') ~= '' then return {'closed'} end
if (head('hold') or '') ~= '' then return {'held'} end
local seq, at = tonumber(ARGV[2]), now()
local n = redis.call('LINDEX', P .. 'order', seq - 1 - base())
if not n then return {'empty'} end
local e = redis.call('HMGET', P .. 'e:' .. n, 'status', 'kind', 'dl', 'body', 'sub', 'start', 'tok', 'on_error',
  'tag', 'lane', 'cseq', 'digest')
if e[1] ~= 'pending' or e[2] ~= 'sample' or tonumber(e[3]) < at then return {'empty'} end
local start = e[6] or stamp(at)
redis.call('HSET', P .. 'e:' .. n, 'status', 'running', 'start', start)
local body = ''
if e[4] == '' then body = redis.call('GET', P .. 'b:' .. n) or '' end
return {'entry', n, seq, e[2], e[4], body, e[5], start, e[7], '', e[9], e[10], e[11], e[12]}
