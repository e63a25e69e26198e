-- The members of one model whose time to live has not ended.
local pods = call('ZRANGEBYSCORE', KEY_ALIVE, '(' .. string.format('%.0f', now_ms()), '+inf')
if #pods == 0 then return {} end
return call('HMGET', KEY_MEMBERS, unpack(pods))
