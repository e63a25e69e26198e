"""Experts computed all at once, as a decode step on CUDA does, and one after the other."""

import pytest
import torch
from naive_moe import EXPERTS, HIDDEN, INNER, exact, make


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("at_once", [False, True])
def test_each_token_gets_its_best_experts_by_their_share(tokens, at_once):
    moe, down = make("cpu")
    if at_once:
        moe.wide_down = down.transpose(0, 1).reshape(HIDDEN, EXPERTS * INNER)
    x, residual = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN)
    expected = exact(moe, down, residual, x, 0.5)
    moe.add_to(residual, x, 0.5)
    torch.testing.assert_close(residual.double(), expected, rtol=1e-4, atol=1e-5)
