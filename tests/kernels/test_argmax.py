"""The greedy kernel, interpreted, against torch: ties, no numbers, sizes around its blocks."""

import math

import pytest
import torch
from fresh_seed import fresh_seed

from tasuki_kernels import argmax
from tasuki_kernels.backend import interpreted


@pytest.mark.parametrize("size", [1, 7, 2047, 2048, 2049, 9000])
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_of_the_likeliest_is_found(size: int, count: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    logits = torch.randint(-9, 9, (count, size), generator=generator).float()  # ties abound
    wide = torch.full((count, size + 5), math.nan)
    wide[:, :size] = logits
    with interpreted():
        found = argmax.greedy(wide[:, :size])
    assert found.tolist() == logits.argmax(dim=-1).tolist()


def test_rows_without_a_distribution_get_no_token_and_the_others_are_fed_back() -> None:
    logits = torch.randn(5, 5000)
    logits[0, 4999] = math.nan
    logits[1, 2500] = math.inf
    logits[2] = -math.inf
    logits[3, :4999] = -math.inf
    rows = torch.tensor([4, 2, 0, 6, 1])
    for kernel in (False, True):
        last = torch.full((7,), -5)
        if kernel:
            with interpreted():
                tokens = argmax.greedy(logits, rows, last)
        else:
            tokens = argmax.greedy(logits, rows, last)
        expected = [-1, -1, -1, 4999, int(logits[4].argmax())]
        assert tokens.tolist() == expected
        assert last.tolist() == [-1, expected[4], -1, -5, -1, -5, 4999]
