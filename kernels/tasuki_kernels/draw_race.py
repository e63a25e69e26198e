"""The race of the tokens on the device: noise, and who is first.

The greatest noise - distance wins, which is the least variate * exp(distance), where the noise is
-log(variate): one logarithm less. One pass over the logits, 4 bytes a token (39 MB for 64 rows of
151,936 tokens: 9 us at 4.3 TB/s), and about 100 instructions for the hash and the logarithm, which
take longer than that where there are many rows (some 40 us by their count; not measured).
"""

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.draw_floors import COLUMNS, KEY, REACH, ROW, distances, number, row_of
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import room_for, shares

_BLOCK = 1024
_FAR: tl.constexpr = tl.constexpr(80.0)
"""From there on a token never wins: the likeliest costs 44.4 at most, others 2**-64 of exp(80)."""


def winners(
    logits: torch.Tensor,
    likeliest: torch.Tensor,
    table: torch.Tensor,
    reaches: torch.Tensor | None,
) -> torch.Tensor:
    """`likeliest` [R] int64 with the winner for each draw of `table` whose row has a token (>= 0).

    logits: [R, V] float32; table: see `draw_floors`; reaches: [n] float32, how far from the
    likeliest the tokens of the first n draws may be; those of the others as far as min_p allows.
    """
    count, size = len(table), logits.shape[1]
    parts, share = shares(count, size, _BLOCK)
    costs = torch.empty(count, parts, dtype=torch.float32, device=logits.device)
    where = torch.empty(count, parts, dtype=torch.int32, device=logits.device)
    tokens = likeliest.clone() if count < len(likeliest) else torch.empty_like(likeliest)
    limited = 0 if reaches is None else len(reaches)
    pdl = overlaps(logits)
    _first_of_share[(count, parts)](
        logits, likeliest, table, reaches, costs, where, size, logits.stride(0), share, limited,
        LIMITED=limited > 0, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    _first_of_row[(count,)](
        costs, where, likeliest, table, tokens, parts,
        BLOCK=room_for(parts), PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return tokens


@triton.jit
def variates(key, index):
    """Exponential ones of tokens `index`; `sampling.gumbel_noise` says how their bits are used."""
    bits = key + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    upper = (bits >> 63) > 0
    high = ((bits >> 32) & 0x7FFFFFFF).to(tl.int32).to(tl.float32)
    low = (bits.to(tl.uint32) | 1).to(tl.float32)
    share = (high + low * 2.3283064365386963e-10) * 2.3283064365386963e-10
    # -log(share), or -log1p(-share) = -log(rest) * share / (1 - rest), whatever `rest` rounds to.
    rest = 1.0 - share
    tiny = rest == 1.0
    slope = tl.where(upper, 1.0, share) / tl.where(upper | tiny, 1.0, 1.0 - rest)
    return tl.where(tiny & (upper == 0), 1.0, -tl.log(tl.where(upper, share, rest))) * slope


@quick
@triton.jit(do_not_specialize=["limited"])
def _first_of_share(
    logits, likeliest, table, reaches, costs, where, size, stride, share, limited,
    LIMITED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of `share` tokens of one draw: the least cost, and whose it is."""
    i_draw, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    row, greatest, inverse = row_of(logits, likeliest, table, i_draw, stride)
    key = tl.load(table + i_draw * COLUMNS + KEY).to(tl.uint64, bitcast=True)
    reach = number(table, i_draw, REACH).to(tl.float32)
    if LIMITED:
        reach = tl.load(reaches + i_draw, mask=i_draw < limited, other=reach)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    end = tl.minimum((i_part + 1) * share, size)
    for first in range(i_part * share, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        distance = distances(row, index, end, greatest, inverse)
        cost = variates(key, index) * tl.exp(tl.minimum(distance, _FAR))
        better = (distance <= reach) & (cost < least)
        least = tl.where(better, cost, least)
        at = tl.where(better, index, at)
    lowest = tl.min(least)
    out = i_draw * tl.num_programs(1) + i_part
    tl.store(costs + out, lowest)
    tl.store(where + out, tl.min(tl.where(least == lowest, at, 2147483647)))


@quick
@triton.jit(do_not_specialize=["parts"])
def _first_of_row(
    costs, where, likeliest, table, tokens, parts, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    i_draw, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    let_next_start(PDL)
    wait_for_previous(PDL)
    i_row = tl.load(table + i_draw * COLUMNS + ROW)
    inside = lane < parts
    cost = tl.load(costs + i_draw * parts + lane, mask=inside, other=float("inf"))
    index = tl.load(where + i_draw * parts + lane, mask=inside, other=2147483647)
    winner = tl.min(tl.where(cost == tl.min(cost), index, 2147483647)).to(tl.int64)
    before = tl.load(likeliest + i_row)
    tl.store(tokens + i_row, tl.where(before < 0, before, winner))
