-- An append whose acknowledgement was lost is sent again with its token, and found by it. One that belongs to a lease is
-- rejected unless the lease is held with the same token as when it was sent; one that expects checkpoints, unless they
-- have these texts. `epoch` and `offset` are the last position that the calling process knows of: a stream that ends
-- before it has lost events that were acknowledged, and their ids must not be given again. KEYS[5] is the stream to copy.
local stream, state, applied, lease, source = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local options = cjson.decode(ARGV[1])
local before = redis.call('GET', applied)
if before then return {string.match(before, '(%d+)-(%d+)')} end
if options.lease and redis.call('GET', lease) ~= options.fence then return redis.error_reply('LEASELOST') end

local conflict, met = {'CONFLICT'}, true
for _, expected in ipairs(options.expected) do
    local text = redis.call('HGET', state, expected[1])
    met = met and (text or '') == expected[2] and (text ~= false) == expected[3]
    table.insert(conflict, text)
end
if not met then return conflict end
if source and (redis.call('EXISTS', source) == 0 or redis.call('EXISTS', stream) == 1) then return {'CONFLICT'} end

local function last_id(key)
    local info = redis.pcall('XINFO', 'STREAM', key)
    if info.err then return nil end
    for index = 1, #info, 2 do
        if info[index] == 'last-generated-id' and info[index + 1] ~= '0-0' then
            return string.match(info[index + 1], '(%d+)-(%d+)')
        end
    end
end

local now, fresh = new_epoch(options.seen)
local epoch, offset = last_id(stream)
if source then
    local later = last_id(source)
    if later and tonumber(later) >= tonumber(fresh) then fresh = string.format('%.0f', tonumber(later) + 1) end
    local after = '-'
    while after do
        local entries = redis.call('XRANGE', source, after, options.copy_until, 'COUNT', 100)
        after = #entries > 0 and '(' .. entries[#entries][1] or nil
        for _, entry in ipairs(entries) do
            if entry[2][4] ~= 'end' then redis.call('XADD', stream, entry[1], unpack(entry[2])) end
        end
    end
end
local begins = not epoch or (epoch == options.epoch and tonumber(offset) < tonumber(options.offset))
if begins then epoch, offset = fresh, 0 end
local last = string.format('%.0f', offset)
for index = 2, #ARGV, 3 do
    offset = offset + 1
    last = string.format('%.0f', offset)
    redis.call('XADD', stream, epoch .. '-' .. last,
        't', now, 'e', ARGV[index], 'k', ARGV[index + 1], 'd', ARGV[index + 2])
end
if #ARGV == 1 and begins then -- the channel exists, though it is empty
    redis.call('XGROUP', 'CREATE', stream, 'new', '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', stream, 'new')
    redis.call('XSETID', stream, epoch .. '-0')
end
redis.call('XTRIM', stream, 'MAXLEN', options.keep)
for _, checkpoint in ipairs(options.checkpoints) do
    local name, text = checkpoint[1], checkpoint[2]
    redis.call('HSET', state, name, name == options.located and epoch .. '-' .. last .. ' ' .. text or text)
end
for _, name in ipairs(options.removed) do redis.call('HDEL', state, name) end
for _, count in ipairs(options.counts) do redis.call('HINCRBY', state, count[1], count[2]) end
if options.expires then
    redis.call('PEXPIREAT', stream, options.expires)
    redis.call('PEXPIREAT', state, options.expires)
elseif options.idle then
    redis.call('PEXPIRE', stream, options.idle)
    redis.call('PEXPIRE', state, options.idle)
end
redis.call('SET', applied, epoch .. '-' .. last, 'EX', options.token_seconds)
return {epoch, last}
