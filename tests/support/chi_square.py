"""A goodness-of-fit test that fails by chance once in about a billion.

Pairs that overlap vary more than independent ones: of them it fails once in about forty million.
"""

import math
from collections.abc import Sequence

_NORMAL_QUANTILE = 6.0
"""Of 1 - 1e-9."""


def assert_fits(counts: Sequence[int], probabilities: Sequence[float]) -> None:
    """Pearson's test of `counts` against `probabilities`; rare outcomes are pooled.

    Critical value after Wilson and Hilferty (1931).
    """
    total = sum(counts)
    impossible = [i for i, p in enumerate(probabilities) if p == 0.0 and counts[i]]
    assert not impossible, f"outcomes {impossible} have probability 0"
    cells = [(counts[i], p * total) for i, p in enumerate(probabilities) if p * total >= 8]
    pooled = sum(p * total for p in probabilities if p * total < 8)
    if pooled >= 8:
        cells.append((total - sum(seen for seen, _ in cells), pooled))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    if freedom == 0:
        return
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + _NORMAL_QUANTILE * math.sqrt(spread)) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} of {freedom} exceeds {limit:.1f}"
