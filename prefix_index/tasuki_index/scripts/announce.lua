-- A pod says that it lives. Returns its mark; a mark other than the one it sent means that nothing of
-- what it published counts any more.
-- ARGV: pod, incarnation, member, ttl ms, mark held ('' for none), sequence held
local pod, incarnation, member, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local now = now_ms()

local function fresh_mark()
  local old = call('ZRANGEBYSCORE', KEY_DEAD, '-inf', swept() - BUCKETS, 'LIMIT', 0, 1)[1]
  if old then
    call('ZREM', KEY_DEAD, old)
    return old
  end
  local number = call('HINCRBY', KEY_COUNTERS, 'marks', 1)
  if number > 65535 then return redis.error_reply('no mark is free for ' .. pod) end
  return string.char(math.floor(number / 256), number % 256)
end

-- Redis refuses writes that take memory where it is full, unless a script has written already. Who
-- lives must be known even then; what pods hold need not.
call('EXPIRE', KEY_MEMBERS, 2 * BUCKET_SECONDS)

for _, name in ipairs(call('ZRANGEBYSCORE', KEY_ALIVE, '-inf', now - GRACE_MS)) do retire(name) end

local mark = call('HGET', KEY_MARKS, pod)
local held = mark and mark == ARGV[5]
  and call('HGET', KEY_OWNERS, mark) == incarnation .. '/' .. pod
  and call('HGET', KEY_SEQUENCES, mark) == ARGV[6]
if not held then
  retire(pod)
  mark = fresh_mark()
  if type(mark) == 'table' then return mark end
  call('HSET', KEY_MARKS, pod, mark)
  call('HSET', KEY_OWNERS, mark, incarnation .. '/' .. pod)
  call('HSET', KEY_SEQUENCES, mark, 0)
end
call('HSET', KEY_MEMBERS, pod, member)
call('ZADD', KEY_ALIVE, now + ttl, pod)
sweep(ttl)
for _, key in ipairs(REGISTRY) do call('EXPIRE', key, 2 * BUCKET_SECONDS) end
return mark
