-- Deletes the entries of a stream that are older than a time, in milliseconds since 1970.
while true do
    local entries = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 100)
    if #entries == 0 then return 0 end
    for _, entry in ipairs(entries) do
        if tonumber(entry[2][2]) >= tonumber(ARGV[1]) then
            redis.call('XTRIM', KEYS[1], 'MINID', entry[1])
            return 0
        end
    end
    redis.call('XTRIM', KEYS[1], 'MAXLEN', redis.call('XLEN', KEYS[1]) - #entries)
end
