-- Drops entries that are sealed in storage. ARGV: epoch ('' once the run has ended), last seq to drop,
-- at most so many, how many client_seqs of a lane stay known. Answers {'ok', base}.
if not head('epoch') then return {'missing'} end
if ARGV[1] == '' then
  if (head('closed') or '') == '' then return {'fenced'} end
elseif head('epoch') ~= ARGV[1] then
  return {'fenced'}
end
local first, freed = base(), 0
-- Once the run has ended every entry is finished, whatever was applied.
local finished = ARGV[1] == '' and first + redis.call('LLEN', P .. 'order') or tonumber(head('applied'))
local last = math.min(tonumber(ARGV[2]), finished)
local upto = math.min(last, first + tonumber(ARGV[3]))
for _ = first + 1, upto do
  local n = redis.call('LPOP', P .. 'order')
  local lane, cseq = entry(n, 'lane') or '', tonumber(entry(n, 'cseq') or '')
  if lane ~= '' and cseq then
    redis.call('HDEL', P .. 'lane:' .. lane, 'm:' .. string.format('%d', cseq - tonumber(ARGV[4])))
  end
  freed = freed + redis.call('STRLEN', P .. 'b:' .. n) + redis.call('STRLEN', P .. 'r:' .. n)
  redis.call('DEL', P .. 'e:' .. n, P .. 'b:' .. n, P .. 'r:' .. n)
end
if upto > first then
  redis.call('HSET', P .. 'head', 'base', string.format('%d', upto))
  redis.call('HINCRBY', P .. 'head', 'unsealed', -freed)
end
return {'ok', base()}
