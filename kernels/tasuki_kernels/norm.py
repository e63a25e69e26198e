"""RMSNorm (Zhang & Sennrich 2019)."""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import let_next_start, overlaps, use_triton, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import power_of_two


@dataclasses.dataclass(frozen=True, slots=True)
class RmsNorm:
    """A norm's weight [d] and epsilon; zero-centred weights come as 1 + weight, in float32.

    Weight None: it lies in the matrix of the product that follows (`fold_into_`).
    """

    weight: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x normed over its last dimension, a new tensor."""
        return rms_norm(x, self.weight, self.eps)

    def fold_into_(self, matrix: torch.Tensor) -> "RmsNorm":
        """Multiplies matrix [out, d] by the weight; what then stands before its product.

        Rounds the matrix to its dtype once more; kernels that compute the norm with the product do
        not round x.
        """
        if self.weight is not None:
            matrix.mul_(self.weight.float())
        return RmsNorm(None, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, computed in float32.

    x: [..., d], any dtype; weight: [d] (on the CPU, whatever is broadcastable to x), or None for
    ones. Reads x once and writes as much.
    """
    if use_triton(x):
        return _launch(x, weight, eps)
    normed = normalize(x.float(), eps)
    if weight is not None:
        normed.mul_(weight)
    return normed.to(x.dtype)


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) over the last dimension; x: [..., d] float32."""
    # x * sqrt(d) / sqrt(sum(x**2) + d * eps), in three operations: hypot adds the squares.
    size = x.shape[-1]
    zero, floor = _constants(size * eps, x.device)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)
    return torch.addcdiv(zero, x, norm, value=size**0.5)


def _launch(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    size = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, size)
    count = rows.shape[0]
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = power_of_two(size)
    if count:
        pdl = overlaps(x)
        _rms_norm_kernel[(count,)](
            rows, weight, out, rows.stride(0), eps, SIZE=size, BLOCK=block, PDL=pdl,
            num_warps=max(1, min(16, block // 512)), launch_pdl=pdl,
        )  # fmt: skip
    return out if x.dim() == 2 else out.view(x.shape)


@quick
@triton.jit
def _rms_norm_kernel(
    x, weight, out, x_stride, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program per row, which it holds in registers."""
    let_next_start(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, BLOCK)
    inside = o_dim < SIZE
    b_weight = 1.0
    if weight is not None:
        b_weight = tl.load(weight + o_dim, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    b_x = tl.load(x + i_row * x_stride + o_dim, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / SIZE + eps)
    b_out = b_x * inverse * b_weight
    tl.store(out + i_row * SIZE + o_dim, b_out.to(out.dtype.element_ty), mask=inside)


@functools.cache
def _constants(floor_squared: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros((), device=device), torch.tensor(floor_squared**0.5, device=device)
