-- Ends the registration of a pod. Its entries stay until swept; look-ups already ignore them.
local function retire(name)
  local mark = call('HGET', KEY_MARKS, name)
  if mark then
    call('HDEL', KEY_MARKS, name)
    call('HDEL', KEY_OWNERS, mark)
    call('HDEL', KEY_SEQUENCES, mark)
    call('ZADD', KEY_DEAD, swept(), mark)
  end
  call('HDEL', KEY_MEMBERS, name)
  call('ZREM', KEY_ALIVE, name)
end
