"""Norms, activations and rope against their definitions in float64."""

import math

import fresh_seed
import pytest
import torch

from tasuki_kernels import activation, norm, rope
from tasuki_kernels.backend import interpreted


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_folded_into_a_matrix_leaves_one_without_a_weight(dtype):
    weight, matrix = torch.randn(64).to(dtype), torch.randn(8, 64).to(dtype)
    products = matrix.float() * weight.float()
    folded = norm.RmsNorm(weight, 1e-5).fold_into_(matrix)
    assert folded == norm.RmsNorm(None, 1e-5)
    assert torch.equal(matrix, products.to(dtype))  # rounded once
    x = torch.randn(3, 64).to(dtype)
    with interpreted():
        by_kernel = folded(x)
    assert torch.equal(folded(x), norm.rms_norm(x, torch.ones(64), 1e-5))
    torch.testing.assert_close(by_kernel, folded(x))


def test_rms_norm_of_zeros_is_zero():
    assert not norm.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).any()


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    result = norm.rms_norm(x, weight, 1e-6)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, norm.rms_norm(x.float(), weight.float(), 1e-6).bfloat16())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 33), (5, 3, 16), (0, 8)])
def test_the_rms_norm_kernel_equals_its_reference(shape, dtype):
    wide = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype)
    x, weight = wide[..., : shape[-1]], torch.randn(shape[-1]).to(dtype)
    x.normal_()
    expected = norm.rms_norm(x, weight, 1e-5)
    with interpreted():
        result = norm.rms_norm(x, weight, 1e-5)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 2 * 33), (3, 2 * 1100), (0, 8)])
def test_the_activation_kernels_equal_their_references(shape, dtype):
    x = (torch.randn(shape) * 4.0).to(dtype)
    with interpreted():
        gated, squared = activation.swiglu(x), activation.relu2_(x.clone())
    torch.testing.assert_close(gated, activation.swiglu(x.clone()))
    torch.testing.assert_close(squared, activation.relu2_(x.clone()))


@pytest.mark.parametrize("function", [activation.swiglu, activation.relu2_])
def test_activation_kernels_do_not_hide_nan(function):
    with interpreted():
        assert function(torch.full((2, 8), torch.nan)).isnan().all()
