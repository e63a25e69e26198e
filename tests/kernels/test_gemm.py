"""Products with their edges, by kernels for few rows and by torch, against float64."""

import fresh_seed
import pytest
import torch
from naive_gemm import exact

from tasuki_kernels import gemm
from tasuki_kernels.backend import interpreted
from tasuki_kernels.gemm import Plan
from tasuki_kernels.norm import RmsNorm

EPS = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(fresh_seed.fresh_seed())


def poisoned(rows, columns, dtype=torch.float32):
    """A tensor with a row stride: whatever is read beside it spoils the result."""
    wide = torch.full((rows, columns + 24), torch.nan, dtype=dtype)
    return wide[:, 8 : 8 + columns]


def case(rows, outputs, inputs, dtype, biased):
    x = poisoned(rows, inputs, dtype).normal_()
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    return x, weight, bias


def vector(block_out, block_in, warps=1):
    constants = {"BLOCK_OUT": block_out, "BLOCK_IN": block_in, "num_warps": warps}
    return Plan("vector", constants)


def split(block_out, block_in, parts):
    constants = {"BLOCK_OUT": block_out, "BLOCK_IN": block_in, "SPLIT": parts}
    return Plan("split", constants | {"STAGES": 3, "EARLY": 0, "PREFETCH": 0, "num_warps": 4})


TORCH = Plan("torch", {})
CASES = [  # rows, outputs, inputs
    (1, 16, 128, TORCH),
    (1, 16, 128, vector(2, 128)),
    (1, 23, 96, vector(4, 128)),
    (1, 6, 1536, vector(1, 512, 4)),
    (1, 19, 176, vector(8, 64, 2)),
    (5, 24, 48, TORCH),
    (2, 32, 64, split(16, 32, 1)),
    (20, 23, 64, split(16, 16, 2)),
    (16, 64, 96, split(32, 16, 3)),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [None, "weighted", "folded"])
@pytest.mark.parametrize("activation", [None, "swiglu", "relu2"])
@pytest.mark.parametrize("shape", CASES)
def test_linear_is_the_product_with_its_edges(shape, activation, normed, biased):
    rows, outputs, inputs, plan = shape
    outputs *= 2 if activation == "swiglu" else 1
    x, weight, bias = case(rows, outputs, inputs, torch.float32, biased)
    norm = RmsNorm(torch.randn(inputs) if normed == "weighted" else None, EPS) if normed else None
    with interpreted():
        result = gemm.linear(x, weight, bias, norm=norm, activation=activation, plan=plan)
    expected = exact(x, weight, bias, norm, activation)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", CASES)
def test_add_linear_adds_to_the_residual_and_to_nothing_beside_it(shape, biased):
    rows, outputs, inputs, plan = shape
    x, weight, bias = case(rows, outputs, inputs, torch.float32, biased)
    residual = poisoned(rows, outputs).normal_()
    expected = residual.double() + 0.3 * exact(x, weight, bias, None, None)
    for _ in range(2):  # The second product with a weight finds its counters as the first did.
        with interpreted():
            gemm.add_linear_(residual, x, weight, bias, 0.15, plan=plan)
    torch.testing.assert_close(residual.double(), expected, rtol=1e-4, atol=1e-5)
    assert residual._base.isnan().sum() == residual._base.numel() - residual.numel()


@pytest.mark.parametrize(
    ("plan", "bound"),
    [(TORCH, 1e-2), (vector(4, 1024), 1e-4)],  # torch on the CPU rounds before it converts
)
def test_half_precision_is_summed_in_float32_and_kept_so_where_asked(plan, bound):
    x, weight, _ = case(1, 32, 1024, torch.bfloat16, False)
    with interpreted():
        result = gemm.linear(x, weight, dtype=torch.float32, plan=plan)
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result.double(), exact(x, weight, None, None, None), rtol=bound, atol=bound
    )


def test_the_kernel_follows_the_rows():
    x, weight, _ = case(20, 24, 64, torch.float32, False)
    with interpreted():
        assert gemm.plan_for(x[:1], weight).kernel == "vector"
        assert gemm.plan_for(x, weight) == TORCH
        assert gemm.plan_for(x[:0], weight) == TORCH
    assert gemm.plan_for(x[:1], weight) == TORCH
    assert [gemm.rows_of_table(rows) for rows in (1, 2, 16, 17, 64)] == [1, 16, 16, 32, 64]


def test_a_table_is_for_numbers_of_16_bits(monkeypatch):
    """In float32 the pieces of a tuned product would not fit on a multiprocessor."""
    choices = {"gemm_split": split(16, 32, 1).constants}
    monkeypatch.setattr(gemm.tuning, "choice", lambda _, kernel, *key: choices.get(kernel))
    gemm._plan.cache_clear()
    x, weight, _ = case(20, 24, 64, torch.float32, False)
    with interpreted():
        assert gemm.plan_for(x.bfloat16(), weight.bfloat16()) == split(16, 32, 1)
        assert gemm.plan_for(x, weight) == TORCH
    gemm._plan.cache_clear()


def test_no_rows_give_no_rows():
    with interpreted():
        result = gemm.linear(torch.empty(0, 64), torch.randn(32, 64), activation="swiglu")
    assert result.shape == (0, 16)
