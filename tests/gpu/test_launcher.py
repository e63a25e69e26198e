"""Quick launches choose the variant that Triton would: alignment, ones, widths, constants."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from tasuki_kernels.launcher import QuickKernel, quick

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]


@triton.jit
def _affine(x, out, factor, shift, size, optional, DOUBLE: tl.constexpr, BLOCK: tl.constexpr = 64):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size) * factor + shift
    if DOUBLE:
        value *= 2
    if optional is not None:
        value += tl.load(optional + at, mask=at < size)
    tl.store(out + at, value, mask=at < size)


def test_every_kind_of_argument_gets_its_own_variant() -> None:
    kernel = quick(_affine)
    assert isinstance(kernel, QuickKernel)
    memory = torch.arange(4096, device="cuda")
    kinds = list(itertools.product((1, 2, 16, 1 << 33), (0, 1, 2), (1, 77), (False, True)))
    for _ in range(2):  # the second time nothing is compiled
        for factor, offset, size, with_optional in kinds:
            x = memory[offset : offset + size]
            out = torch.full((100,), -1, device="cuda")
            optional = x if with_optional else None
            kernel[(triton.cdiv(size, 64),)](x, out, factor, 3, size, optional, DOUBLE=False)
            expected = x * factor + 3 + (x if with_optional else 0)
            assert torch.equal(out[:size], expected)
            assert (out[size:] == -1).all()


def test_constants_and_options_are_told_apart() -> None:
    kernel = quick(_affine)
    x = torch.arange(1000, device="cuda")
    for block, warps, double in ((32, 1, True), (128, 1, False), (128, 4, True), (32, 2, False)):
        out = torch.zeros_like(x)
        kernel[(triton.cdiv(1000, block),)](
            x, out, 5, 0, 1000, None, DOUBLE=double, BLOCK=block, num_warps=warps
        )
        assert torch.equal(out, x * (10 if double else 5))


def test_arguments_by_name_are_refused() -> None:
    x = torch.arange(10, device="cuda")
    with pytest.raises(TypeError, match="by position"):
        quick(_affine)[(1,)](x, x.clone(), 2, 0, size=10, optional=None, DOUBLE=False)
