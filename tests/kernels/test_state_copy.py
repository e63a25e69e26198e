"""Slots copied onto others: torch and Triton alike."""

import contextlib

import fresh_seed
import pytest
import torch

from tasuki_kernels.backend import interpreted
from tasuki_kernels.state_copy import copy_slots


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("way", [contextlib.nullcontext, interpreted])
def test_pairs_are_copied_and_nothing_else(way, indices):
    torch.manual_seed(fresh_seed.fresh_seed())
    region = torch.randint(0, 256, (7, 16 * 3001), dtype=torch.uint8)
    expected = region.clone()
    expected[[5, 2]] = region[[1, 6]]
    sources, targets = torch.tensor([[1, 6, 0, 0], [5, 2, 0, 0]], dtype=indices)
    with way():
        copy_slots(region, sources, targets)
    assert torch.equal(region, expected)
