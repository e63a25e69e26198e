"""Norms, activations and rope against their definitions in float64."""

import math

import fresh_seed
import pytest
import torch

from tasuki_kernels import activation, norm, rope


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(fresh_seed.fresh_seed())


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (5, 3, 16)])
def test_rms_norm_divides_by_the_root_mean_square(shape, scale):
    x, weight, eps = torch.randn(shape) * scale, torch.randn(shape[-1]), 1e-5
    exact = x.double()
    exact = exact / torch.sqrt(exact.square().mean(-1, keepdim=True) + eps) * weight.double()
    close(norm.rms_norm(x, weight, eps), exact)


def test_rms_norm_of_zeros_is_zero():
    assert not norm.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).any()


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    result = norm.rms_norm(x, weight, 1e-6)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, norm.rms_norm(x.float(), weight.float(), 1e-6).bfloat16())


@pytest.mark.parametrize("groups", [1, 4])
def test_gated_rms_norm_gates_first_and_normalises_each_group(groups):
    x, gate, weight, eps = torch.randn(6, 32), torch.randn(6, 40)[:, 8:], torch.randn(32), 1e-5
    gated = (x.double() * gate.double() * torch.sigmoid(gate.double())).view(6, groups, -1)
    exact = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + eps)
    close(norm.gated_rms_norm(x, gate, weight, eps, groups), exact.view(6, 32) * weight.double())


def test_swiglu_gates_the_second_half_with_the_first():
    x = torch.randn(5, 24)
    gate, up = x.double().chunk(2, dim=-1)
    close(activation.swiglu(x), gate * torch.sigmoid(gate) * up)


def test_relu2_squares_what_is_positive():
    x = torch.randn(5, 24)
    close(activation.relu2_(x.clone()), x.double().clamp(min=0) ** 2)


def test_rope_turns_each_pair_by_position_times_frequency():
    dim, positions = 12, torch.tensor([0, 1, 7, 100_000])
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    x = torch.randn(len(positions), 3, dim)
    cos, sin = rope.rope_tables(positions, frequencies, 1.5)
    result = rope.apply_rope(x, cos, sin)
    for token, position in enumerate(positions.tolist()):
        for pair in range(dim // 2):
            # As in float32 inference everywhere, the angle itself is rounded to float32.
            angle = float(torch.tensor(float(position)) * frequencies[pair])
            a, b = x[token, :, pair].double(), x[token, :, pair + dim // 2].double()
            turned = a * math.cos(angle) - b * math.sin(angle)
            other = a * math.sin(angle) + b * math.cos(angle)
            close(result[token, :, pair], 1.5 * turned)
            close(result[token, :, pair + dim // 2], 1.5 * other)
