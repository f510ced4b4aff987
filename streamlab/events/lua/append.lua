-- An append whose acknowledgement was lost is sent again with its token, and found by it. One that belongs to a lease is
-- rejected unless the lease is held with the same token as when it was sent.
local stream, state, applied, lease = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local before = redis.call('GET', applied)
if before then return {string.match(before, '(%d+)-(%d+)')} end
if lease and redis.call('GET', lease) ~= ARGV[4] then return redis.error_reply('LEASELOST') end
local now, epoch = new_epoch(ARGV[3])
local offset = 0
local info = redis.pcall('XINFO', 'STREAM', stream)
if not info.err then
    for index = 1, #info, 2 do
        if info[index] == 'last-generated-id' and info[index + 1] ~= '0-0' then
            epoch, offset = string.match(info[index + 1], '(%d+)-(%d+)')
        end
    end
end
local last = string.format('%.0f', offset)
for index = 8, #ARGV, 3 do
    offset = offset + 1
    last = string.format('%.0f', offset)
    redis.call('XADD', stream, epoch .. '-' .. last,
        't', now, 'e', ARGV[index], 'k', ARGV[index + 1], 'd', ARGV[index + 2])
end
redis.call('XTRIM', stream, 'MAXLEN', ARGV[1])
if ARGV[6] ~= '' then redis.call('HSET', state, ARGV[6], ARGV[7]) end
if ARGV[2] ~= '0' then
    redis.call('PEXPIRE', stream, ARGV[2])
    redis.call('PEXPIRE', state, ARGV[2])
end
redis.call('SET', applied, epoch .. '-' .. last, 'PX', ARGV[5])
return {epoch, last}
