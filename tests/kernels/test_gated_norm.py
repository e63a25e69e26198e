"""The gated norm against its definition in float64."""

import fresh_seed
import pytest
import torch

from tasuki_kernels import gated_norm


def exact_norm(x, gate, eps, groups):
    gated = (x.double() * gate.double() * torch.sigmoid(gate.double())).view(len(x), groups, -1)
    exact = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + eps)
    return exact.view(len(x), -1)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_gate_acts_first_and_each_group_is_normalised(groups):
    torch.manual_seed(fresh_seed.fresh_seed())
    x, gate, eps = torch.randn(6, 32), torch.randn(6, 40)[:, 8:], 1e-5
    normed = gated_norm.gated_rms_norm(x, gate, eps, groups)
    expected = exact_norm(x, gate, eps, groups)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)
