"""Activations of feed-forward layers."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tasuki_kernels.backend import use_triton
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks

_BLOCK = 1024


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate and up are the halves of the last dimension (Shazeer 2020).

    gate_up: [tokens, 2 * d], contiguous; returns [tokens, d]. Reads 2, writes 1 number per output.
    """
    if use_triton(gate_up):
        return _launch_swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def relu2_(x: torch.Tensor) -> torch.Tensor:
    """relu(x) ** 2, in place, of a contiguous x (So et al. 2021)."""
    if use_triton(x):
        if x.numel():
            grid = (blocks(x.numel(), _BLOCK),)
            _relu2_kernel[grid](x, x.numel(), BLOCK=_BLOCK, num_warps=4)
        return x
    return x.relu_().square_()


@triton.jit
def silu(x):
    """x * sigmoid(x), of float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def relu2(x):
    """max(x, 0) squared; NaN stays NaN."""
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


def _launch_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    if tokens:
        grid = (tokens, blocks(size, _BLOCK))
        _swiglu_kernel[grid](gate_up, out, SIZE=size, BLOCK=_BLOCK, num_warps=4)
    return out


@quick
@triton.jit
def _swiglu_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o_dim < SIZE
    p_gate = gate_up + i_row * 2 * SIZE + o_dim
    b_gate = tl.load(p_gate, mask=inside).to(tl.float32)
    b_up = tl.load(p_gate + SIZE, mask=inside).to(tl.float32)
    tl.store(
        out + i_row * SIZE + o_dim, (silu(b_gate) * b_up).to(out.dtype.element_ty), mask=inside
    )


@quick
@triton.jit
def _relu2_kernel(x, size, BLOCK: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_x < size
    b_x = tl.load(x + o_x, mask=inside).to(tl.float32)
    tl.store(x + o_x, relu2(b_x).to(x.dtype.element_ty), mask=inside)
