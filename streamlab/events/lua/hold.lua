-- A lease is taken with a new token (ARGV 3 is 1), and renewed with the same: one that expired in between is lost, even
-- if no other process has had it.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if not holder and ARGV[3] == '0' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
