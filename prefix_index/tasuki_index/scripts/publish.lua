-- Applies one batch of a registration's events. Returns 1, or 0 when the registration or a batch
-- before this one is not known here: then the pod must register and publish all again.
-- ARGV: mark, sequence of this batch (from 1), events of 1 + NAME bytes: op, name
-- op: 0 block evicted, 1 block stored, 2 checkpoint evicted, 3 checkpoint stored
local mark, sequence, events = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local applied = call('HGET', KEY_SEQUENCES, mark)
if not applied or applied + 1 ~= sequence then return 0 end

local function store(bucket, field)
  local marks = call('HGET', bucket, field)
  if not marks then
    call('HSET', bucket, field, mark)
    call('EXPIRE', bucket, BUCKET_SECONDS)
  elseif not find_mark(marks, mark) then
    call('HSET', bucket, field, marks .. mark)
  end
end

local function evict(bucket, field)
  local marks = call('HGET', bucket, field)
  local at = marks and find_mark(marks, mark)
  if not at then return end
  if #marks == 2 then
    call('HDEL', bucket, field)
  else
    call('HSET', bucket, field, string.sub(marks, 1, at - 1) .. string.sub(marks, at + 2))
  end
end

for at = 1, #events, 1 + NAME do
  local op = string.byte(events, at)
  local bucket = bucket_of(events, at + 1)
  local field = string.sub(events, at + 3, at + KEPT)
  if op >= 2 then field = field .. CHECKPOINT end
  if op % 2 == 1 then store(bucket, field) else evict(bucket, field) end
end
call('HSET', KEY_SEQUENCES, mark, ARGV[2])
return 1
