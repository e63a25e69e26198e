-- A pod leaves, unless another incarnation has taken its name.
-- ARGV: pod, incarnation
local pod = ARGV[1]
local mark = call('HGET', KEY_MARKS, pod)
if not mark or call('HGET', KEY_OWNERS, mark) ~= ARGV[2] .. '/' .. pod then return 0 end
retire(pod)
return 1
