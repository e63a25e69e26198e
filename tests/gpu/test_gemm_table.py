"""What was measured fastest on an H200 also gives the product, whatever card this is."""

import pytest
import torch
from fresh_seed import fresh_seed
from naive_gemm import exact

from tasuki_kernels import gemm, tuning
from tasuki_kernels.norm import RmsNorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]

BOUND = 5e-2  # a rounding of the result; squares double it
TABLE = tuning.tables("NVIDIA H200")[-1]
ENTRIES = [
    (kernel, key) for kernel in ("vector", "split") for key in sorted(TABLE[f"gemm_{kernel}"])
]


@pytest.mark.parametrize(("kernel", "key"), ENTRIES)
def test_every_entry_gives_the_product(kernel, key):
    torch.manual_seed(fresh_seed())
    plan = gemm.Plan(kernel, TABLE[f"gemm_{kernel}"][key])
    rows, outputs, inputs, *rest = key.split("/")
    activation = rest[0] if rest else None
    x = torch.randn(int(rows), int(inputs), device="cuda").bfloat16()
    weight = (torch.randn(int(outputs), int(inputs), device="cuda") / int(inputs) ** 0.5).bfloat16()
    norm = RmsNorm(None, 1e-6)
    for count in {int(rows), int(rows) // 2 + 1}:
        result = gemm.linear(x[:count], weight, norm=norm, activation=activation, plan=plan)
        expected = exact(x[:count], weight, None, norm, activation)
        torch.testing.assert_close(result.double(), expected, rtol=BOUND, atol=BOUND)
