"""The maths of a random token: weights after temperature and filters, and one draw per row.

A filter is a floor: all tokens that are at least as likely as the last one it must keep stay. So
ties are kept together, and the outcome depends neither on a sort's order nor on other rows. A draw
inverts the distribution function, in vocabulary order and float64, at a number that is hashed from
its key. Parameters come as host lists, so that what no row asks for costs nothing.
"""

import torch

_CANDIDATES = 128
"""Likeliest tokens that are sorted; a nucleus that reaches further is found by radix selection."""
_MASK64 = (1 << 64) - 1


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A number in [0, 1) of 52 random bits that depends on its arguments alone.

    The splitmix64 generator (Steele, Lea, Flood 2014) at step `position`, started from a hash of
    seed and sample. 52 bits, so that `u * total < total` in float64.
    """
    state = _mix64(_mix64(seed & _MASK64) + sample_index)
    return (_mix64(state + position * 0x9E3779B97F4A7C15) >> 12) * 2.0**-52


def _mix64(value: int) -> int:
    """splitmix64's output function of `value` one step on."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def invert_cdf(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """[R] int64: where the running sum of `weights` [R, V] first exceeds `points` [R] of its total.

    weights: float32, not negative, some positive; points: float64 in [0, 1 - 2**-52].
    """
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cdf, points[:, None] * cdf[:, -1:], right=True)[:, 0]


def weigh(
    logits: torch.Tensor,
    *,
    temperatures: list[float],
    min_ps: list[float],
    top_ks: list[int],
    top_ps: list[float],
) -> torch.Tensor:
    """exp((`logits` - max) / temperature) [R, V], 0 for what min_p, top_k, then top_p exclude.

    logits: [R, V] float32, not changed. Lists have R entries; temperatures are above 0; a top_k of
    0, a top_p of 1 and a min_p of 0 exclude nothing. The maximum goes first, so that no temperature
    overflows; the likeliest token weighs 1.
    """
    weights = logits - logits.amax(dim=-1, keepdim=True)
    weights.div_(_column(temperatures, weights)).exp_()
    if any(min_p > 0.0 for min_p in min_ps):
        weights.masked_fill_(weights < _column(min_ps, weights), 0.0)
    vocab_size = logits.shape[1]
    limited = [i for i, k in enumerate(top_ks) if 0 < k < vocab_size or top_ps[i] < 1.0]
    if limited:
        part = weights if len(limited) == len(logits) else weights[limited]
        _keep_likeliest(part, [top_ks[i] for i in limited], [top_ps[i] for i in limited])
        if part is not weights:
            weights[limited] = part
    return weights


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keep_likeliest(weights: torch.Tensor, top_ks: list[int], top_ps: list[float]) -> None:
    """top_k, then top_p of what it left: zeroes the others in `weights` [R, V]."""
    vocab_size = weights.shape[1]
    top_ks = [k if 0 < k < vocab_size else 0 for k in top_ks]
    best = weights.topk(min(max(*top_ks, _CANDIDATES), vocab_size), dim=-1).values
    if any(top_ks):
        ranks = torch.tensor(top_ks, device=weights.device)[:, None]
        floors = best.gather(1, (ranks - 1).clamp_(min=0)).masked_fill_(ranks == 0, 0.0)
        weights.masked_fill_(weights < floors, 0.0)
        best.masked_fill_(best < floors, 0.0)
    if any(top_p < 1.0 for top_p in top_ps):
        shares = torch.tensor(top_ps, dtype=torch.float64, device=weights.device)[:, None]
        weights.masked_fill_(weights < _nucleus_floors(weights, best, shares), 0.0)


def _nucleus_floors(
    weights: torch.Tensor, best: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """[R, 1]: the greatest weight such that tokens of no less hold `shares` [R, 1] of the total.

    best: [R, K] greatest weights, in order. A share of 1 has the floor 0, whatever rounding says.
    """
    mass = shares * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    last = (before < mass).sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    floors = best.gather(1, last).masked_fill_(shares >= 1.0, 0.0)
    far = (((before + best)[:, -1:] < mass) & (shares < 1.0))[:, 0]
    if bool(far.any()):
        floors[far] = _select_floors(weights[far], mass[far])
    return floors


def _select_floors(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """`_nucleus_floors` of any width, without a sort: radix selection by mass instead of count.

    The bits of non-negative floats are ordered as the floats are. Of the 30 bits of floats up to 1,
    ten a pass: how much weight lies at each value of these bits, and at which is the mass reached?
    """
    bits = weights.view(torch.int32)
    part = weights.double()  # what has the floor's bits so far
    floor = torch.zeros_like(mass, dtype=torch.int32)
    above = torch.zeros_like(mass)
    for shift in (20, 10, 0):
        digits = (bits >> shift).bitwise_and_(1023).long()
        table = part.new_zeros(len(part), 1024).scatter_add_(1, digits, part)
        reached = table.flip(-1).cumsum(dim=-1).flip(-1).add_(above)
        digit = (reached >= mass).sum(dim=-1, keepdim=True).clamp_(min=1) - 1
        above = (reached - table).gather(1, digit)
        floor = (floor << 10) | digit.int()
        part = part.where(digits == digit, 0.0)
    return floor.view(torch.float32)
