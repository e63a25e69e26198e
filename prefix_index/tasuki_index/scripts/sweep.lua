-- Visits the next `count` buckets: renews their expiry, and drops dead marks if there are any. A mark
-- is given out again only when every bucket was visited after its death.
local function clean(bucket)
  local entries = call('HGETALL', bucket)
  for i = 1, #entries, 2 do
    local marks, kept = entries[i + 1], {}
    for at = 1, #marks, 2 do
      local mark = string.sub(marks, at, at + 1)
      if call('HEXISTS', KEY_OWNERS, mark) == 1 then kept[#kept + 1] = mark end
    end
    if #kept == 0 then
      call('HDEL', bucket, entries[i])
    elseif #kept * 2 < #marks then
      call('HSET', bucket, entries[i], table.concat(kept))
    end
  end
end

local function sweep(count)
  local first, dirty = swept(), call('ZCARD', KEY_DEAD) > 0
  for number = first, first + count - 1 do
    local bucket = KEYS[1] .. ':b' .. number % BUCKETS
    if call('EXPIRE', bucket, BUCKET_SECONDS) == 1 and dirty then clean(bucket) end
  end
  call('HSET', KEY_COUNTERS, 'swept', string.format('%.0f', first + count))
end
