"""Products with their edges on CUDA: against float64, and the same bits every time."""

import pytest
import torch
from fresh_seed import fresh_seed
from naive_gemm import exact

from tasuki_kernels import activation, gemm, norm
from tasuki_kernels.norm import RmsNorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]

EPS = 1e-6
# float32: other orders of summation. bfloat16: a rounding of the result, one of the normed input
# where a norm kernel stands before, one of what goes into the activation where torch multiplies;
# squares double them.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
SPLITS = [  # block_out, block_in, split, stages, early, prefetch, warps; outputs, inputs
    ((32, 64, 1, 8, 0, 0, 4), (1000, 1024, None)),
    ((32, 128, 4, 3, 0, 1, 4), (300, 2048, "swiglu")),
    ((64, 64, 2, 4, 1, 1, 4), (300, 1024, "swiglu")),
    ((128, 64, 8, 3, 1, 0, 8), (72, 3072, "relu2")),
]
ROWS = [1, 2, 3, 4, 5, 16, 31, 33, 64, 65, 300]
SHAPES = [(1024, 2048), (1025, 72), (300, 3072), (130, 5376)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(fresh_seed())


def strided(rows, columns, dtype):
    """Rows with poison between them."""
    wide = torch.full((rows, columns + 64), torch.nan, device="cuda", dtype=dtype)
    return wide[:, 32 : 32 + columns]


def case(rows, outputs, inputs, dtype):
    x = strided(rows, inputs, dtype).normal_()
    weight = (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda").to(dtype)
    return x, weight, bias


def split_plan(*values):
    names = ("BLOCK_OUT", "BLOCK_IN", "SPLIT", "STAGES", "EARLY", "PREFETCH", "num_warps")
    return gemm.Plan("split", dict(zip(names, values, strict=True)))


def close(result, expected, dtype):
    bound = BOUNDS[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("act", [None, "swiglu", "relu2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_product_with_its_edges(shape, act, dtype):
    outputs, inputs = shape
    for rows in ROWS:
        x, weight, bias = case(rows, outputs * (2 if act == "swiglu" else 1), inputs, dtype)
        normed = RmsNorm(torch.randn(inputs, device="cuda").to(dtype), EPS)
        for given_bias, given_norm in ((None, normed), (bias, None), (None, RmsNorm(None, EPS))):
            result = gemm.linear(x, weight, given_bias, norm=given_norm, activation=act)
            close(result, exact(x, weight, given_bias, given_norm, act), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_linear_adds_to_the_residual_and_to_nothing_beside_it(shape, dtype):
    for rows in ROWS:
        x, weight, bias = case(rows, *shape, dtype)
        for given in (None, bias):
            residual = strided(rows, shape[0], dtype).normal_()
            expected = residual.double() + 0.22 * exact(x, weight, given, None, None)
            gemm.add_linear_(residual, x, weight, given, 0.22)
            close(residual, expected, dtype)
            assert residual._base.isnan().sum() == residual._base.numel() - residual.numel()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("split", "product"), SPLITS)
def test_every_split_gives_the_product(split, product, dtype):
    outputs, inputs, act = product
    plan = split_plan(*split)
    for rows in (2, 16, 31):
        x, weight, bias = case(rows, outputs * (2 if act == "swiglu" else 1), inputs, dtype)
        x *= 3.0
        for norm_weight in (None, torch.randn(inputs, device="cuda").to(dtype)):
            normed = RmsNorm(norm_weight, EPS)
            result = gemm.linear(x, weight, bias, norm=normed, activation=act, plan=plan)
            close(result, exact(x, weight, bias, normed, act), dtype)
        residual = strided(rows, weight.shape[0], dtype).normal_()
        expected = residual.double() + 0.22 * exact(x, weight, None, None, None)
        gemm.add_linear_(residual, x, weight, scale=0.22, plan=plan)
        close(residual, expected, dtype)
        assert residual._base.isnan().sum() == residual._base.numel() - residual.numel()


def test_logits_come_in_float32_without_a_rounding_between():
    for rows in ROWS:
        x, weight, _ = case(rows, 5000, 1024, torch.bfloat16)
        logits = gemm.linear(x, weight, dtype=torch.float32)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(
            logits.double(), exact(x, weight, None, None, None), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("split", [None, *(split for split, _ in SPLITS)])
@pytest.mark.parametrize("rows", [1, 32])
def test_a_captured_chain_gives_the_bits_of_an_eager_one_every_time(rows, split):
    """Kernels start before the ones they depend on have ended: a missed wait would show."""
    plan = split_plan(*split) if split else None
    hidden, inner, layers = 1024, 3072, 8
    ups = [torch.randn(2 * inner, hidden, device="cuda").bfloat16() / 32 for _ in range(layers)]
    downs = [torch.randn(hidden, inner, device="cuda").bfloat16() / 55 for _ in range(layers)]
    normed = RmsNorm(None, EPS)
    start = torch.randn(rows, hidden, device="cuda").bfloat16()

    def chain():
        residual = start.clone()
        for up, down in zip(ups, downs, strict=True):
            inside = gemm.linear(residual, up, norm=normed, activation="swiglu", plan=plan)
            gemm.add_linear_(residual, inside, down, scale=0.5, plan=plan)
        return residual

    eager = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(100):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, eager)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("size", [64, 1000, 4096, 21504])
def test_norm_and_activations_of_many_rows(size, dtype):
    x = strided(700, size, dtype).normal_()
    weight = torch.randn(size, device="cuda")
    close(norm.rms_norm(x, weight, EPS), exact_norm(x, weight), dtype)
    gate_up = torch.randn(700, 2 * size, device="cuda").to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(activation.swiglu(gate_up), gate * torch.sigmoid(gate) * up, dtype)
    expected = gate_up.double().clamp(min=0).square()
    close(activation.relu2_(gate_up), expected, dtype)


def exact_norm(x, weight):
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()
