"""The maths of a random token: a race between the tokens that temperature and filters leave.

A filter is a floor: all tokens that are at least as likely as the last one it must keep stay. So
ties are kept together, and the outcome depends neither on a sort's order nor on other rows.

Of the tokens left, the one with the greatest logit / temperature + noise wins, and it wins with the
probability that softmax gives it where the noise is Gumbel's (Gumbel 1954; Maddison, Tarlow, Minka
2014). The noise is hashed from (seed, sample, position, token). So other rounding of the logits, in
another batch or on another device, changes the token only where the first two of the race are that
close: for differences of 1e-5, about once in 200,000 tokens.

Parameters come as host lists, so that what no row asks for costs nothing.
"""

import functools
import math

import numpy as np
import torch

from tasuki_kernels import draw_floors, draw_race
from tasuki_kernels.backend import use_triton

_CANDIDATES = 128
"""Likeliest tokens that are sorted; a nucleus that reaches further is found by radix selection."""
_CACHED = 16384
"""Tokens whose noise is computed at a time, so that what lies between stays in the cache."""
_LEAST_INVERSE = 1e-30
"""Of a temperature: hotter ones all draw alike, and an infinite logit times it is no NaN."""
_INFINITY_BITS = 0x7F800000
_MASK64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def race_key(seed: int, sample_index: int, position: int) -> int:
    """int64: names the noise of one draw."""
    return _signed(_mix64(_sample_key(seed, sample_index) + position))


@functools.lru_cache(maxsize=4096)
def _sample_key(seed: int, sample_index: int) -> int:
    return _mix64(_mix64(seed & _MASK64) + sample_index)


def gumbel_noise(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[R, N] float32: the noise of `tokens` [N] int64 in the races of `keys` [R] int64.

    The splitmix64 generator (Steele, Lea, Flood 2014), started at the key, gives token i 64 bits at
    its step i: one says on which side of the median the token's exponential variate lies, and 63
    how far towards 0 or infinity. Both ends keep float32's relative precision: the variate is at
    least 2**-64, so a token that is drawn once in 10**19 times can be drawn, and at most 44.4, so
    all noise is finite, from -3.8 to 44.4. The bits are the same on every device; logarithms differ
    by a unit in the last place.
    """
    width = max(1, _CACHED // len(keys))
    firsts = range(0, len(tokens), width)
    return torch.cat([_noise_of_few(keys, tokens[i : i + width]) for i in firsts], dim=1)


def _noise_of_few(keys: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    bits = keys[:, None] + (tokens + 1).mul_(_signed(_STEP))
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        bits.bitwise_xor_(_logical_shift(bits, shift)).mul_(_signed(factor))
    bits.bitwise_xor_(_logical_shift(bits, 31))
    upper = (bits >> 63).neg_().float()
    low = (bits & 0xFFFFFFFF).bitwise_or_(1).float().mul_(2.0**-32)
    share = (bits >> 32).bitwise_and_(0x7FFFFFFF).float().add_(low).mul_(2.0**-32)  # (0, 1/2]
    # As torch.where(upper, share.log(), share.neg().log1p()), at a third of its price.
    variate = share.neg().log1p_().mul_(1.0 - upper).addcmul_(share.log_(), upper)
    return variate.neg_().log_().neg_()


def _logical_shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """int64, shifted to the right as if it were unsigned."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _mix64(value: int) -> int:
    """splitmix64's output function of `value` one step on."""
    value = (value + _STEP) & _MASK64
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK64
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK64
    return value ^ (value >> 31)


def draw(
    logits: torch.Tensor,
    likeliest: torch.Tensor,
    rows: list[int],
    keys: list[int],
    *,
    temperatures: list[float],
    min_ps: list[float],
    top_ks: list[int],
    top_ps: list[float],
) -> torch.Tensor:
    """`likeliest` [R] int64 with the winner of the race for each of `rows`.

    logits: [R, V] float32, not changed; likeliest: the argmax of each row, or -1 for one that gets
    no token. Lists have an entry for each of `rows`; keys are of `race_key`; temperatures are above
    0; a top_k of 0, a top_p of 1 and a min_p of 0 exclude nothing. min_p goes first, then top_k,
    and top_p shares out what that left. Does not wait for the device.
    """
    if use_triton(logits):
        table, limited = _table(
            logits.shape[1], rows, keys, temperatures, min_ps, top_ks, top_ps, logits.device
        )
        reaches = draw_floors.reach(logits, likeliest, table, limited) if limited else None
        return draw_race.winners(logits, likeliest, table, reaches)
    everyone = len(rows) == len(logits)
    indices = torch.tensor(rows)
    part = logits if everyone else logits.index_select(0, indices)
    before = likeliest if everyone else likeliest.index_select(0, indices)
    scaled = scale(part, before, temperatures)
    tokens = torch.arange(logits.shape[1])
    lowest = floors(scaled, min_ps, top_ks, top_ps)
    if lowest is not None:
        scaled.masked_fill_(scaled < lowest, -math.inf)
        tokens = (scaled != -math.inf).any(dim=0).nonzero()[:, 0]
        scaled = scaled.index_select(1, tokens)
    winners = gumbel_noise(torch.tensor(keys), tokens).add_(scaled).argmax(dim=-1)
    picked = torch.where(before < 0, before, tokens[winners])
    return picked if everyone else likeliest.index_copy(0, indices, picked)


def _table(
    vocab_size: int,
    rows: list[int],
    keys: list[int],
    temperatures: list[float],
    min_ps: list[float],
    top_ks: list[int],
    top_ps: list[float],
    device: torch.device,
) -> tuple[torch.Tensor, int]:
    """The kernels' parameters (see `draw_floors`), and how many draws have a top_k or top_p.

    Those come first. Only the likeliest stay with a top_k of 1, as with a min_p of 1.
    """
    likeliest_only = np.equal(top_ks, 1)
    table = np.empty((len(rows), draw_floors.COLUMNS.value), np.int64)
    numbers = table.view(np.float64)
    table[:, draw_floors.ROW.value] = rows
    table[:, draw_floors.KEY.value] = keys
    inverse = 1.0 / np.array(temperatures)
    numbers[:, draw_floors.INVERSE.value] = np.maximum(inverse, _LEAST_INVERSE)
    with np.errstate(divide="ignore"):
        numbers[:, draw_floors.REACH.value] = np.abs(np.log(np.where(likeliest_only, 1.0, min_ps)))
    excess = likeliest_only | np.greater_equal(top_ks, vocab_size)
    table[:, draw_floors.TOP_K.value] = np.where(excess, 0, top_ks)
    numbers[:, draw_floors.TOP_P.value] = np.where(likeliest_only, 1.0, top_ps)
    limited = (table[:, draw_floors.TOP_K.value] > 0) | (numbers[:, draw_floors.TOP_P.value] < 1.0)
    ordered = torch.from_numpy(table[np.argsort(~limited, kind="stable")])
    if device.type == "cuda":
        ordered = ordered.pin_memory()
    return ordered.to(device, non_blocking=True), int(limited.sum())


def scale(logits: torch.Tensor, likeliest: torch.Tensor, temperatures: list[float]) -> torch.Tensor:
    """(`logits` - those of `likeliest`) / temperature [R, V], 0 at most.

    The maximum goes first, so that no temperature overflows.
    """
    scaled = logits - logits.gather(1, likeliest.clamp(min=0)[:, None])
    inverse = [max(1.0 / temperature, _LEAST_INVERSE) for temperature in temperatures]
    return scaled.mul_(_column(inverse, logits.dtype))


def floors(
    scaled: torch.Tensor, min_ps: list[float], top_ks: list[int], top_ps: list[float]
) -> torch.Tensor | None:
    """[R, 1]: the least of `scaled` [R, V] that the filters keep; None if they keep all.

    scaled: logarithms of the weight that each token has beside the likeliest.
    """
    vocab_size = scaled.shape[1]
    limited = [i for i, k in enumerate(top_ks) if 0 < k < vocab_size or top_ps[i] < 1.0]
    if not limited and not any(min_ps):
        return None
    logs = [math.log(min_p) if min_p > 0.0 else -math.inf for min_p in min_ps]
    lowest = _column(logs, scaled.dtype)
    if limited:
        rows = _column(limited, torch.int64)[:, 0]
        part = _limit(
            scaled.index_select(0, rows),
            lowest.index_select(0, rows),
            [top_ks[i] for i in limited],
            [top_ps[i] for i in limited],
        )
        lowest = lowest.index_copy(0, rows, part)
    return lowest


def _column(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


def _limit(
    scaled: torch.Tensor, lowest: torch.Tensor, top_ks: list[int], top_ps: list[float]
) -> torch.Tensor:
    """`lowest` [R, 1] raised by top_k, then by top_p of what that left."""
    vocab_size = scaled.shape[1]
    top_ks = [k if 0 < k < vocab_size else 0 for k in top_ks]
    best = scaled.topk(min(max(*top_ks, _CANDIDATES), vocab_size), dim=-1).values
    if any(top_ks):
        ranks = _column(top_ks, torch.int64)
        last = best.gather(1, (ranks - 1).clamp_(min=0))
        lowest = torch.where(ranks > 0, torch.maximum(lowest, last), lowest)
    if any(top_p < 1.0 for top_p in top_ps):
        shares = _column(top_ps, torch.float64)
        weights = scaled.exp().masked_fill_(scaled < lowest, 0.0)
        mass = shares * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
        nucleus = _nucleus_floors(scaled, weights, best, best >= lowest, mass)
        lowest = torch.where(shares < 1.0, torch.maximum(lowest, nucleus), lowest)
    return lowest


def _nucleus_floors(
    scaled: torch.Tensor,
    weights: torch.Tensor,
    best: torch.Tensor,
    kept: torch.Tensor,
    mass: torch.Tensor,
) -> torch.Tensor:
    """[R, 1]: the greatest floor such that tokens not below it weigh `mass` [R, 1] together.

    best: [R, K] greatest of `scaled`, in order; kept: which of them weigh anything.
    """
    upto = best.exp().mul_(kept).cumsum(dim=-1, dtype=torch.float64)
    reached = upto >= mass
    nucleus = best.gather(1, reached.int().argmax(dim=-1, keepdim=True))
    rows = ~reached[:, -1]
    if bool(rows.any()):
        nucleus[rows] = _select_floors(scaled[rows], weights[rows], mass[rows])
    return nucleus


def _select_floors(scaled: torch.Tensor, weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """`_nucleus_floors` of any width, without a sort: radix selection by mass instead of count.

    The bits of floats that are not negative are ordered as the floats are. Ten bits of the distance
    from the likeliest a pass: how much weight lies at each value, and at which is `mass` reached?
    """
    bits = scaled.abs().view(torch.int32)
    part = weights.double()  # what has the floor's bits so far
    floor = torch.zeros_like(mass, dtype=torch.int32)
    before = torch.zeros_like(mass)
    for shift, width in ((20, 2048), (10, 1024), (0, 1024)):
        digits = (bits >> shift).bitwise_and_(width - 1).long()
        table = part.new_zeros(len(part), width).scatter_add_(1, digits, part)
        upto = table.cumsum(dim=-1).add_(before)
        digit = (upto < mass).sum(dim=-1, keepdim=True).clamp_(max=width - 1)
        before = (upto - table).gather(1, digit)
        floor = (floor << 10) | digit.int()
        part = part.where(digits == digit, 0.0)
    return floor.clamp_(max=_INFINITY_BITS).view(torch.float32).neg_()
