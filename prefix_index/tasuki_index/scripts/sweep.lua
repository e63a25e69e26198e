-- Visits this heartbeat's share of the buckets, such that all are visited in a lap however many pods
-- there are: renews their expiry, and drops dead marks if there are any. A mark is given out again
-- only when every bucket was visited after its death.
local function clean(bucket, owned)
  local entries = call('HGETALL', bucket)
  for i = 1, #entries, 2 do
    local marks, kept = entries[i + 1], {}
    for at = 1, #marks, 2 do
      local mark = string.sub(marks, at, at + 1)
      if owned[mark] then kept[#kept + 1] = mark end
    end
    if #kept == 0 then
      call('HDEL', bucket, entries[i])
    elseif #kept * 2 < #marks then
      call('HSET', bucket, entries[i], table.concat(kept))
    end
  end
end

local function sweep(ttl_ms)
  local first, dirty, owned = swept(), call('ZCARD', KEY_DEAD) > 0, {}
  local laps_a_heartbeat = ttl_ms / 3000 / LAP_SECONDS / call('ZCARD', KEY_ALIVE)
  local count = math.min(BUCKETS, math.ceil(BUCKETS * laps_a_heartbeat))
  if dirty then
    for _, mark in ipairs(call('HKEYS', KEY_OWNERS)) do owned[mark] = true end
  end
  for number = first, first + count - 1 do
    local bucket = KEYS[1] .. ':b' .. number % BUCKETS
    if call('EXPIRE', bucket, BUCKET_SECONDS) == 1 and dirty then clean(bucket, owned) end
  end
  call('HSET', KEY_COUNTERS, 'swept', string.format('%.0f', first + count))
end
