"""How far from the likeliest a token may be: top_k and top_p on the device, without a sort.

Three kernels. The first measures what lies within each of 16 distances: how many tokens, or how
much weight. The second copies what lies within the nearest of them that is enough, some hundred
tokens out of a vocabulary. The third, one program a row, narrows the bound down among these, by
bisection of the bits of floats, which are ordered as the floats are. Where more tokens come so near
than there is room for (a hot or flat distribution), it looks at the row itself instead.

Reads the logits twice (4 bytes a token: at 256 rows of 151,936 tokens 311 MB, 72 us at 4.3 TB/s; a
single row stays in the L2 cache), and row by row up to 31 times where there is no room.
"""

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import room_for, shares

ROW: tl.constexpr = tl.constexpr(0)
KEY: tl.constexpr = tl.constexpr(1)
INVERSE: tl.constexpr = tl.constexpr(2)
REACH: tl.constexpr = tl.constexpr(3)
TOP_K: tl.constexpr = tl.constexpr(4)
TOP_P: tl.constexpr = tl.constexpr(5)
COLUMNS: tl.constexpr = tl.constexpr(6)
"""Of the table of parameters, int64 [draws, COLUMNS]: the row of logits, the race's key, and, as
bits of float64, 1 / temperature, the distance that min_p allows and top_p; top_k is 0 for none."""

_BLOCK = 1024
_ROOM = 16384
_SEARCH_BLOCK = 4096
_BOUNDS: tl.constexpr = tl.constexpr(16)
_GREATEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


def reach(
    logits: torch.Tensor, likeliest: torch.Tensor, table: torch.Tensor, count: int
) -> torch.Tensor:
    """[count] float32: the distance from the likeliest up to which tokens stay in the race.

    logits: [R, V] float32; likeliest: [R] int64; the first `count` draws of `table` have a top_k or
    a top_p. A distance is (greatest logit - logit) / temperature.
    """
    size, stride, device = logits.shape[1], logits.stride(0), logits.device
    parts, share = shares(count, size, _BLOCK)
    within = torch.empty(count, parts, _BOUNDS.value, dtype=torch.float32, device=device)
    weight = torch.empty(count, parts, dtype=torch.float64, device=device)
    near = torch.empty(count, _ROOM, dtype=torch.float32, device=device)
    filled = torch.empty(count, dtype=torch.int32, device=device)
    found = torch.empty(count, dtype=torch.float32, device=device)
    pdl = overlaps(logits)
    _survey[(count, parts)](
        logits, likeliest, table, within, weight, filled, size, stride, share,
        BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    _gather[(count, parts)](
        logits, likeliest, table, within, weight, near, filled, size, stride, share, parts,
        PARTS=room_for(parts), ROOM=_ROOM, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    _narrow[(count,)](
        logits, likeliest, table, weight, near, filled, found, size, stride, parts,
        PARTS=room_for(parts), ROOM=_ROOM, BLOCK=_SEARCH_BLOCK, PDL=pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return found


@triton.jit
def number(table, i_draw, COLUMN: tl.constexpr):
    """A float64 of the table."""
    return tl.load(table + i_draw * COLUMNS + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def row_of(logits, likeliest, table, i_draw, stride):
    """The row of a draw: where it begins, its greatest logit (0 if it gets no token),
    1 / temperature."""
    i_row = tl.load(table + i_draw * COLUMNS + ROW)
    row = logits + i_row * stride
    token = tl.load(likeliest + i_row)
    best = tl.load(row + token, mask=token >= 0, other=0.0)
    return row, best, number(table, i_draw, INVERSE).to(tl.float32)


@triton.jit
def distances(row, index, end, best, inverse):
    """Of tokens `index` from the likeliest; infinite from `end` on."""
    value = tl.load(row + index, mask=index < end, other=float("-inf"))
    return (best - value) * inverse


@triton.jit
def _bounds():
    """The distances that the survey measures: 2**-4 and up, each 1.68 times the one before."""
    return tl.exp2(tl.arange(0, _BOUNDS) * 0.75 - 4.0)


@quick
@triton.jit
def _survey(
    logits, likeliest, table, within, weight, filled, size, stride, share,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of `share` tokens: how many (with a top_k) or how much weight within each bound; the weight
    of all."""
    i_draw, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, best, inverse = row_of(logits, likeliest, table, i_draw, stride)
    allowed = number(table, i_draw, REACH).to(tl.float32)
    counts = tl.load(table + i_draw * COLUMNS + TOP_K) > 0
    bounds = _bounds()
    b_within = tl.zeros((_BOUNDS,), tl.float32)
    b_weight = tl.zeros((BLOCK,), tl.float64)
    end = tl.minimum((i_part + 1) * share, size)
    for first in range(i_part * share, end, BLOCK):
        distance = distances(row, first + tl.arange(0, BLOCK), end, best, inverse)
        own = tl.where(distance <= allowed, tl.exp(-distance), 0.0)
        b_weight += own.to(tl.float64)
        amount = tl.where(counts & (distance <= allowed), 1.0, own)
        reached = distance[None, :] <= bounds[:, None]
        b_within += tl.sum(tl.where(reached, amount[None, :], 0.0), axis=1)
    out = i_draw * tl.num_programs(1) + i_part
    tl.store(within + out * _BOUNDS + tl.arange(0, _BOUNDS), b_within)
    tl.store(weight + out, tl.sum(b_weight))
    if i_part == 0:
        tl.store(filled + i_draw, 0)


@triton.jit
def _total(weight, i_draw, parts, PARTS: tl.constexpr):
    o_part = tl.arange(0, PARTS)
    return tl.sum(tl.load(weight + i_draw * parts + o_part, mask=o_part < parts, other=0.0))


@quick
@triton.jit(do_not_specialize=["parts"])
def _gather(
    logits, likeliest, table, within, weight, near, filled, size, stride, share, parts,
    PARTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copies the distances within the nearest bound that surely holds enough, in any order."""
    i_draw, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, best, inverse = row_of(logits, likeliest, table, i_draw, stride)
    o_part, o_bound = tl.arange(0, PARTS), tl.arange(0, _BOUNDS)
    at = (i_draw * parts + o_part[:, None]) * _BOUNDS + o_bound[None, :]
    b_within = tl.sum(tl.load(within + at, mask=o_part[:, None] < parts, other=0.0), axis=0)
    top_k = tl.load(table + i_draw * COLUMNS + TOP_K)
    # Weights are float32 here: what rounding could reach is left out.
    mass = number(table, i_draw, TOP_P) * _total(weight, i_draw, parts, PARTS) * 1.001
    enough = b_within.to(tl.float64) >= tl.where(top_k > 0, top_k.to(tl.float64), mass)
    bound = tl.min(tl.where(enough, _bounds(), _GREATEST))
    bound = tl.minimum(bound, number(table, i_draw, REACH).to(tl.float32))
    end = tl.minimum((i_part + 1) * share, size)
    for first in range(i_part * share, end, BLOCK):
        distance = distances(row, first + tl.arange(0, BLOCK), end, best, inverse)
        kept = (distance <= bound).to(tl.int32)
        count = tl.sum(kept)
        if count > 0:
            place = tl.atomic_add(filled + i_draw, count) + tl.cumsum(kept) - 1
            tl.store(near + i_draw * ROOM + place, distance, mask=(kept > 0) & (place < ROOM))


@quick
@triton.jit(do_not_specialize=["parts"])
def _narrow(
    logits, likeliest, table, weight, near, filled, found, size, stride, parts,
    PARTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The reach of one row: of top_k, then of top_p among what that left."""
    i_draw = tl.program_id(0).to(tl.int64)
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, best, inverse = row_of(logits, likeliest, table, i_draw, stride)
    allowed = tl.minimum(number(table, i_draw, REACH).to(tl.float32), _GREATEST)
    top_k = tl.load(table + i_draw * COLUMNS + TOP_K)
    top_p = number(table, i_draw, TOP_P)
    total = _total(weight, i_draw, parts, PARTS)
    count = tl.load(filled + i_draw)
    high = allowed.to(tl.int32, bitcast=True)
    if count <= ROOM:
        source = near + i_draw * ROOM
        high = _limit(source, count, best, inverse, high, top_k, top_p, total, False, BLOCK)
    else:
        high = _limit(row, size, best, inverse, high, top_k, top_p, total, True, BLOCK)
    tl.store(found + i_draw, high.to(tl.float32, bitcast=True))


@triton.jit
def _limit(
    source, size, best, inverse, high, top_k, top_p, total, RAW: tl.constexpr, BLOCK: tl.constexpr
):
    if top_k > 0:
        high = _bisect(source, size, best, inverse, high, top_k.to(tl.float64), True, RAW, BLOCK)
        total, _, _ = _upto(source, size, best, inverse, high, False, RAW, BLOCK)
    if top_p < 1.0:
        high = _bisect(source, size, best, inverse, high, top_p * total, False, RAW, BLOCK)
    return high


@triton.jit
def _bisect(
    source, size, best, inverse, high, target,
    COUNT: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least distance, as bits, up to which there is `target`; `high` if there is less."""
    low = high * 0 - 1
    while high - low > 1:
        middle = low + (high - low) // 2
        amount, below, above = _upto(source, size, best, inverse, middle, COUNT, RAW, BLOCK)
        # On to the next distance that a token has: what is between holds none.
        if amount >= target:
            high = below
        else:
            low = tl.minimum(above - 1, high)
    return high


@triton.jit
def _upto(
    source, size, best, inverse, middle,
    COUNT: tl.constexpr, RAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens up to `middle`, or their weight; the last distance there, and the next.

    RAW: `source` is a row of logits, else distances.
    """
    amount = tl.zeros((BLOCK,), tl.float64)
    below = tl.full((BLOCK,), -1, tl.int32)
    above = tl.full((BLOCK,), 2147483647, tl.int32)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        if RAW:
            distance = distances(source, index, size, best, inverse)
        else:
            distance = tl.load(source + index, mask=index < size, other=float("inf"))
        bits = distance.to(tl.int32, bitcast=True)
        inside = bits <= middle
        own = tl.full((BLOCK,), 1.0, tl.float32) if COUNT else tl.exp(-distance)
        amount += tl.where(inside, own, 0.0).to(tl.float64)
        below = tl.maximum(below, tl.where(inside, bits, -1))
        above = tl.minimum(above, tl.where(inside, 2147483647, bits))
    return tl.sum(amount), tl.max(below), tl.min(above)
