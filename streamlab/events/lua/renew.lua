-- Compares the position of a watch with the end of its stream: 1 if the end was lost, and the stream begins a new epoch;
-- 2 if all was lost, and another process, which did not know of the old epoch, began with an earlier one.
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
if info.err then return 0 end
for index = 1, #info, 2 do
    if info[index] == 'last-generated-id' then
        local epoch, offset = string.match(info[index + 1], '(%d+)-(%d+)')
        if epoch == ARGV[1] and tonumber(offset) < tonumber(ARGV[2]) then
            local _, fresh = new_epoch(ARGV[3])
            redis.call('XSETID', KEYS[1], fresh .. '-0')
            return 1
        end
        if tonumber(epoch) < tonumber(ARGV[1]) and info[index + 1] ~= '0-0' then return 2 end
    end
end
return 0
