-- Ends the run. ARGV: status, error JSON of the run (or ''), status and error JSON of its open entries.
if redis.call('EXISTS', P .. 'head') == 0 then return {'missing'} end
if (head('closed') or '') ~= '' then return {'closed', head('closed')} end
close(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
return {'ok'}
