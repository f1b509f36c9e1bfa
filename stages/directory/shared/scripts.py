"""What a Redis or Valkey server does for a directory, in Lua; each is one step for all others.

    tierloomNAME               a chunk, NAME of 16 bytes: words of its holders
    tierloom!w                 workers: number to epoch and record; nNAME to process and turns
    tierloom!hNUMBER           lives as long as the worker does: EPOCH:SEQUENCE it has come to
    tierloom!l, tierloom!s     whether a sweep is due, and where it goes on

In a cluster `{PLACE}` follows the prefix, 4 hex digits: in a chunk's key the first of its name; in
all others those by which every node has them to itself, so that each can tell by itself who lives.
Redis 7 or newer, or Valkey.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha1
from typing import NamedTuple

from tierloom.stages.directory.shared.records import CHANGE, MOST_HOLDERS, MOST_TIERS, NAME, NUMBERS
from tierloom.stages.tiers.redis.resp import command


@cache
def _hash(text: str) -> str:
    return sha1(text.encode()).hexdigest()


class Script(NamedTuple):
    """A script, which a server knows by its hash once it has run it."""

    text: str

    def by_hash(self, key: bytes, *arguments: bytes | int) -> bytes:
        return command("EVALSHA", _hash(self.text), 1, key, *arguments)

    def whole(self, key: bytes, *arguments: bytes | int) -> bytes:
        return command("EVAL", self.text, 1, key, *arguments)


# `home` is the prefix of all keys that are no chunks. `others`: the words of `v` without those of
# the worker of `w`, if any, and of who is dead.
_LIVING = f"""
local living = {{}}
local function number(w)
  local a, b, c = string.byte(w, 1, 3)
  return a * 4096 + b * 16 + math.floor(c / 16)
end
local function alive(home, n)
  if living[n] == nil then living[n] = redis.call('EXISTS', home .. 'h' .. n) == 1 end
  return living[n]
end
local function others(home, v, w)
  local kept, mine = {{}}, w and number(w)
  for i = 1, #v - 2, 3 do
    local word = string.sub(v, i, i + 2)
    local n = number(word)
    if n ~= mine and alive(home, n) then kept[#kept + 1] = word end
  end
  local from = math.max(1, #kept - {MOST_HOLDERS - 1} + (w and 1 or 0))
  return table.concat(kept, '', from)
end
"""

# A chunk's key.
_TAG = """
local function tag(prefix, tagged, name)
  if not tagged then return prefix .. name end
  return prefix .. string.format('{%02x%02x}', string.byte(name, 1, 2)) .. name
end
"""

# ARGV: prefix, 1 in a cluster, names. Returns words and how many chunks have them, again and again.
FIND = Script(
    _LIVING
    + _TAG
    + """
local prefix, tagged, names, call, sub = ARGV[1], ARGV[2] == '1', ARGV[3], redis.call, string.sub
local seen, out, n, last, now, count = {}, {}, 0, nil, nil, 0
for i = 1, #names, 16 do
  local v = call('GET', tag(prefix, tagged, sub(names, i, i + 15)))
  if v ~= last then
    if not v then break end
    last, now = v, seen[v] or others(KEYS[1], v)
    seen[v] = now
    if now == '' then break end
    n, count = n + 2, 0
    out[n - 1] = now
  end
  count = count + 1
  out[n] = count
end
return out
"""
)

# ARGV: number, ms, epoch, sequence, prefix, 1 in a cluster, changes as they are packed. The first
# write of a chunk that nobody has is one call.
ANNOUNCE = Script(
    _LIVING
    + _TAG
    + f"""
local home, beat, sequence = KEYS[1], KEYS[1] .. 'h' .. ARGV[1], tonumber(ARGV[4])
local at = redis.call('GET', beat)
if at == ARGV[3] .. ':' .. sequence then redis.call('PEXPIRE', beat, ARGV[2]) return 1 end
if at ~= ARGV[3] .. ':' .. sequence - 1 then return 0 end
local all, prefix, tagged, call, sub = ARGV[7], ARGV[5], ARGV[6] == '1', redis.call, string.sub
local words, made = {{}}, {{}}
for tiers = 0, {(1 << MOST_TIERS) - 1} do
  local n = ARGV[1] * {1 << MOST_TIERS} + tiers
  words[tiers] = string.char(math.floor(n / 65536), math.floor(n / 256) % 256, n % 256)
  made[tiers] = {{}}
end
for i = 1, #all, {CHANGE} do
  local tiers, k, v = string.byte(all, i + {NAME}), sub(all, i, i + 15), nil
  k = tag(prefix, tagged, k)
  local w, seen = words[tiers], made[tiers]
  if tiers == 0 then v = call('GET', k) else v = call('SET', k, w, 'NX', 'GET') end
  if v and v ~= w then
    if seen[v] == nil then seen[v] = others(home, v, w) .. (tiers == 0 and '' or w) end
    if seen[v] == '' then call('DEL', k)
    elseif seen[v] ~= v then call('SET', k, seen[v]) end
  end
end
call('SET', beat, ARGV[3] .. ':' .. sequence, 'PX', ARGV[2])
return 1
"""
)

# ARGV: name, process, first and last turn, record. Returns the turn (0: the name is another's)
# and the number of the process that had the name, or -1.
JOIN = Script(
    f"""
local home, w, old = KEYS[1], KEYS[1] .. 'w', -1
local name, process, first, last = 'n' .. ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local p, f, t = string.match(redis.call('HGET', w, name) or '', '^(%x+) (%d+) (%d+)$')
if p then
  f, old = tonumber(f), t % {NUMBERS}
  local older = p ~= process and first > 0 and first <= f
  if older and redis.call('EXISTS', home .. 'h' .. old) == 1 then return {{0, -1}} end
  redis.call('HDEL', w, old)
end
local turn = math.max(tonumber(redis.call('HGET', w, 'last') or 0), last) + 1
while redis.call('EXISTS', home .. 'h' .. turn % {NUMBERS}) == 1 do turn = turn + 1 end
if first == 0 then first = 9007199254740992 end
redis.call('HSET', w, 'last', turn, name, process .. string.format(' %.0f %.0f', first, turn),
  turn % {NUMBERS}, turn .. ' ' .. ARGV[5])
return {{turn, old}}
"""
)

# ARGV: number, ms, epoch, the number that is no more. On each node, after JOIN on one.
ENTER = Script(
    """
redis.call('DEL', KEYS[1] .. 'h' .. ARGV[4])
redis.call('SET', KEYS[1] .. 'h' .. ARGV[1], ARGV[3] .. ':0', 'PX', ARGV[2])
return 1
"""
)

# ARGV: number, ms, epoch, sequence, 1 where the workers are. Takes no memory, so that a full server
# does not bury everyone; and notices where a server that evicts has evicted the workers.
BEAT = Script(
    """
local beat, sequence = KEYS[1] .. 'h' .. ARGV[1], tonumber(ARGV[4])
local at = redis.call('GET', beat)
if at ~= ARGV[3] .. ':' .. sequence and at ~= ARGV[3] .. ':' .. sequence + 1 then return 0 end
if ARGV[5] == '1' and redis.call('HEXISTS', KEYS[1] .. 'w', ARGV[1]) == 0 then return 0 end
return redis.call('PEXPIRE', beat, ARGV[2])
"""
)

# ARGV: number, epoch.
LEAVE = Script(
    """
local beat = KEYS[1] .. 'h' .. ARGV[1]
if string.match(redis.call('GET', beat) or '', '^%d+') == ARGV[2] then
  redis.call('DEL', beat)
  redis.call('HDEL', KEYS[1] .. 'w', ARGV[1])
end
return 1
"""
)

# ARGV: numbers, or none for all. Returns number and record, again and again.
WORKERS = Script(
    """
local home, out, numbers = KEYS[1], {}, ARGV
if #numbers == 0 then numbers = redis.call('HKEYS', home .. 'w') end
for _, n in ipairs(numbers) do
  if tonumber(n) and redis.call('EXISTS', home .. 'h' .. n) == 1 then
    local record = redis.call('HGET', home .. 'w', n)
    if record then out[#out + 1] = n out[#out + 1] = record end
  end
end
return out
"""
)

# KEYS: the chunk's. ARGV: the word.
REPORT = Script(
    """
local v, kept = redis.call('GET', KEYS[1]) or '', {}
for i = 1, #v - 2, 3 do
  local word = string.sub(v, i, i + 2)
  if word ~= ARGV[1] then kept[#kept + 1] = word end
end
local made = table.concat(kept)
if made == v then return 0 end
if made == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], made) end
return 1
"""
)

# ARGV: prefix, bytes of a chunk's key, most, ms. Whoever comes first in so many ms sweeps.
SWEEP = Script(
    _LIVING
    + """
local home, prefix, changed = KEYS[1], ARGV[1], 0
if not redis.call('SET', home .. 'l', 1, 'NX', 'PX', ARGV[4]) then return 0 end
local at = redis.call('GET', home .. 's') or '0'
local got = redis.call('SCAN', at, 'MATCH', prefix .. '*', 'COUNT', ARGV[3], 'TYPE', 'string')
local made = {}
for _, k in ipairs(got[2]) do
  if #k == tonumber(ARGV[2]) then
    local v = redis.call('GET', k)
    if made[v] == nil then made[v] = others(home, v) end
    if made[v] == '' then redis.call('DEL', k) changed = changed + 1
    elseif made[v] ~= v then redis.call('SET', k, made[v]) changed = changed + 1 end
  end
end
redis.call('SET', home .. 's', got[1])
if got[1] == '0' then
  local all = redis.call('HGETALL', home .. 'w')
  for i = 1, #all, 2 do
    local n = tonumber(all[i]) or tonumber(string.match(all[i + 1], '^%x+ %d+ (%d+)$'))
    if n and all[i] ~= 'last' and not alive(home, n % NUMBERS) then
      redis.call('HDEL', home .. 'w', all[i])
    end
  end
end
return changed
""".replace("NUMBERS", str(NUMBERS))
)
