-- Prepended to every script. All keys of a model begin with KEYS[1] = 'tasuki:{fingerprint}' and so
-- lie in one slot. A *mark* is two bytes that stand for one registration of one pod. Of a block's
-- name 8 of 16 bytes are kept: two names that share them cost one wrong hint.
local call = redis.call
local NAME, KEPT = 16, 8                       -- bytes of a block's name; how many of them are kept
local BUCKETS = 65536
local BUCKET_SECONDS, LAP_SECONDS = 7200, 1800 -- a lap of the sweep renews every bucket's expiry
local GRACE_MS = 60000                         -- a silent pod is ignored at once, forgotten later
local KEY_ALIVE = KEYS[1] .. ':alive'          -- zset: pod -> ms when its time to live ends
local KEY_MEMBERS = KEYS[1] .. ':members'      -- hash: pod -> member, as the pod wrote it
local KEY_MARKS = KEYS[1] .. ':marks'          -- hash: pod -> mark
local KEY_OWNERS = KEYS[1] .. ':owners'        -- hash: mark -> incarnation/pod
local KEY_SEQUENCES = KEYS[1] .. ':sequences'  -- hash: mark -> number of batches applied
local KEY_DEAD = KEYS[1] .. ':dead'            -- zset: mark -> buckets swept when it died
local KEY_COUNTERS = KEYS[1] .. ':counters'    -- hash: marks given out, buckets swept
local REGISTRY =
  {KEY_ALIVE, KEY_MEMBERS, KEY_MARKS, KEY_OWNERS, KEY_SEQUENCES, KEY_DEAD, KEY_COUNTERS}
local CHECKPOINT = 'c'                         -- ends the field of a checkpoint; a block's has none

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function swept()
  return tonumber(call('HGET', KEY_COUNTERS, 'swept') or 0)
end

-- The bucket (a hash: field -> marks of the holders) of the name that begins at `at`.
local function bucket_of(names, at)
  local high, low = string.byte(names, at, at + 1)
  return KEYS[1] .. ':b' .. (high * 256 + low) % BUCKETS
end

-- Where `mark` begins in `marks`, or nil.
local function find_mark(marks, mark)
  local at = 0
  repeat at = string.find(marks, mark, at + 1, true) until not at or at % 2 == 1
  return at
end

-- The pod that `mark` stands for, or nil when it died.
local function living_owner(mark, now)
  local owner = call('HGET', KEY_OWNERS, mark)
  if not owner then return nil end
  local pod = string.sub(owner, string.find(owner, '/', 1, true) + 1)
  local deadline = call('ZSCORE', KEY_ALIVE, pod)
  if deadline and tonumber(deadline) > now then return pod end
end
