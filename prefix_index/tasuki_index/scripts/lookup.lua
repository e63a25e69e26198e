-- How deep each living pod could resume a prompt. Returns {pod, depth, pod, depth, ...}, depths in
-- blocks and above 0.
-- ARGV: names of the prompt's blocks, NAME bytes each; '1' if only a checkpoint can be resumed;
--       most checkpoint probes
-- What a registration publishes is closed under prefixes, so holders only drop out as depth grows:
-- divide and conquer along the chain finds all depths in about (distinct depths) x log2(blocks) probes.
local names, needs_checkpoint, probes_left = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3])
local blocks, now = #names / NAME, now_ms()
local depth_of = {}

local function marks_at(depth, suffix)
  local at = (depth - 1) * NAME + 1
  local field = string.sub(names, at + 2, at + KEPT - 1) .. suffix
  return call('HGET', bucket_of(names, at), field) or ''
end

-- Splits `marks` (an array) into those that hold the name at `depth` and those that do not.
local function split(marks, depth, suffix)
  local found, have, lack = marks_at(depth, suffix), {}, {}
  if found == '' then return have, marks end
  for _, mark in ipairs(marks) do
    if find_mark(found, mark) then have[#have + 1] = mark else lack[#lack + 1] = mark end
  end
  return have, lack
end

-- All of `marks` hold at least `low` blocks and at most `high`.
local function resolve(marks, low, high)
  if #marks == 0 then return end
  if low == high then
    for _, mark in ipairs(marks) do depth_of[mark] = low end
    return
  end
  local middle = math.ceil((low + high) / 2)
  local have, lack = split(marks, middle, '')
  resolve(have, middle, high)
  resolve(lack, low, middle - 1)
end

-- Lowers every depth to the deepest checkpoint at or above it; 0 when the probes run out first.
local function lower_to_checkpoints(marks)
  table.sort(marks, function(a, b) return depth_of[a] > depth_of[b] end)
  local searching, next_mark, depth, at_depth = {}, 1, 0, {}
  while #searching > 0 or next_mark <= #marks do
    if #searching == 0 then depth = depth_of[marks[next_mark]] end
    while next_mark <= #marks and depth_of[marks[next_mark]] >= depth do
      searching[#searching + 1] = marks[next_mark]
      next_mark = next_mark + 1
    end
    if depth == 0 or probes_left == 0 then break end
    probes_left = probes_left - 1
    local have, lack = split(searching, depth, CHECKPOINT)
    for _, mark in ipairs(have) do at_depth[mark] = depth end
    searching, depth = lack, depth - 1
  end
  depth_of = at_depth
end

if blocks == 0 then return {} end
local first, living, pods = marks_at(1, ''), {}, {}
for at = 1, #first, 2 do
  local mark = string.sub(first, at, at + 1)
  pods[mark] = living_owner(mark, now)
  if pods[mark] then living[#living + 1] = mark end
end
resolve(living, 1, blocks)
if needs_checkpoint then lower_to_checkpoints(living) end
local result = {}
for mark, depth in pairs(depth_of) do
  result[#result + 1] = pods[mark]
  result[#result + 1] = depth
end
return result
