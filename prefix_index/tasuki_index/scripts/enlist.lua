-- Adds a model to the set that is the key; where Redis is full, too: see announce.lua.
-- ARGV: fingerprint
call('PERSIST', KEYS[1])
return call('SADD', KEYS[1], ARGV[1])
