-- An entry's id is the event's position. An epoch is the server's time in milliseconds, but later than every epoch that
-- the calling process knows of (ARGV), since the clock may have been set back: a stream that was lost and recreated has
-- greater ids than the lost one, and a reader that waits for more of the old one gets its events at once.
local function new_epoch(seen)
    local time = redis.call('TIME')
    local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
    return string.format('%.0f', now), string.format('%.0f', math.max(now, tonumber(seen) + 1))
end
