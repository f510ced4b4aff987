-- An append whose acknowledgement was lost is sent again with its token, and found by it. One that belongs to a lease is
-- rejected unless the lease is held with the same token as when it was sent. ARGV[6] and ARGV[7] are the last position
-- that the calling process knows of: a stream that ends before it has lost events that were acknowledged, and their ids
-- must not be given again.
local stream, state, applied, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local before = redis.call('GET', applied)
if before then return {string.match(before, '(%d+)-(%d+)')} end
if lease and redis.call('GET', lease) ~= ARGV[4] then return redis.error_reply('LEASELOST') end
local now, fresh = new_epoch(ARGV[3])
local epoch, offset = fresh, 0
local info = redis.pcall('XINFO', 'STREAM', stream)
if not info.err then
    for index = 1, #info, 2 do
        if info[index] == 'last-generated-id' and info[index + 1] ~= '0-0' then
            epoch, offset = string.match(info[index + 1], '(%d+)-(%d+)')
            if epoch == ARGV[6] and tonumber(offset) < tonumber(ARGV[7]) then epoch, offset = fresh, 0 end
        end
    end
end
local last = string.format('%.0f', offset)
for index = 10, #ARGV, 3 do
    offset = offset + 1
    last = string.format('%.0f', offset)
    redis.call('XADD', stream, epoch .. '-' .. last,
        't', now, 'e', ARGV[index], 'k', ARGV[index + 1], 'd', ARGV[index + 2])
end
redis.call('XTRIM', stream, 'MAXLEN', ARGV[1])
if ARGV[8] ~= '' then redis.call('HSET', state, ARGV[8], ARGV[9]) end
if ARGV[2] ~= '0' then
    redis.call('PEXPIRE', stream, ARGV[2])
    redis.call('PEXPIRE', state, ARGV[2])
end
redis.call('SET', applied, epoch .. '-' .. last, 'PX', ARGV[5])
return {epoch, last}
