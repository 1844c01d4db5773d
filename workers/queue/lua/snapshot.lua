-- A verified snapshot is in storage. ARGV: epoch, snapshot JSON, oldest seq to branch from.
if not head('epoch') then return {'missing'} end
if head('epoch') ~= ARGV[1] then return {'fenced'} end
redis.call('HSET', P .. 'head', 'snapshot', ARGV[2], 'branch_from', ARGV[3])
return {'ok'}
