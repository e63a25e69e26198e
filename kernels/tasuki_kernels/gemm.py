"""Matrix products with weights, with what stands before and after them.

How a product is computed depends on its shape alone: the table of `tuning` says by which kernel
and in which pieces, for numbers of 16 bits, whose pieces fit on a multiprocessor; without an entry,
one row goes through `gemm_vector`, more through torch.
"""

import dataclasses
import functools
from typing import Literal

import torch

from tasuki_kernels import gemm_split, gemm_vector, tuning
from tasuki_kernels.activation import relu2_, swiglu
from tasuki_kernels.backend import use_triton
from tasuki_kernels.norm import RmsNorm

Activation = Literal["swiglu", "relu2"]
Kernel = Literal["vector", "split", "torch"]
KERNELS: tuple[Kernel, ...] = ("vector", "split", "torch")

SIZES = (16, 32, 64)
"""So many rows the tensor cores compute for fewer. Above, weights are no longer what takes the
time: torch's products are as fast as any."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """By which kernel a product is computed, and the kernel's constants."""

    kernel: Kernel
    constants: tuning.Choice


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: RmsNorm | None = None,
    activation: Activation | None = None,
    dtype: torch.dtype | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """activation(norm(x) W^T + b), in `dtype` or that of x.

    x: [tokens, in]; weight: [out, in], contiguous on CUDA; bias: [out]; plan: instead of the
    table's. Returns [tokens, out], or [tokens, out / 2] after "swiglu", whose gate is the first
    half of the outputs.
    """
    plan = plan or plan_for(x, weight, activation)
    if norm is not None and not _fuses(plan.kernel, norm):
        x, norm = norm(x), None
    if plan.kernel == "torch":
        y = _product(x, weight, bias, dtype)
        if activation == "swiglu":
            return swiglu(y)
        return relu2_(y) if activation == "relu2" else y
    outputs = weight.shape[0] // 2 if activation == "swiglu" else weight.shape[0]
    out = torch.empty(x.shape[0], outputs, dtype=dtype or x.dtype, device=x.device)
    launch = gemm_vector.launch if plan.kernel == "vector" else gemm_split.launch
    launch(x, weight, bias, out, plan.constants, norm=norm, activation=activation)
    return out


def _fuses(kernel: Kernel, norm: RmsNorm) -> bool:
    """Whether the kernel computes the norm: split only what is left of one without its weight."""
    return kernel == "vector" or (kernel == "split" and norm.weight is None)


def add_linear_(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    *,
    plan: Plan | None = None,
) -> None:
    """residual += scale * (x W^T + b), in place.

    residual: [tokens, out]; x: [tokens, in]; weight: [out, in], contiguous on CUDA; bias: [out].
    """
    plan = plan or plan_for(x, weight)
    if plan.kernel == "vector":
        gemm_vector.launch(x, weight, bias, residual, plan.constants, scale=scale)
    elif plan.kernel == "split":
        gemm_split.launch(x, weight, bias, residual, plan.constants, scale=scale)
    elif bias is None:
        residual.addmm_(x, weight.t(), alpha=scale)
    else:
        residual.add_(torch.addmm(bias, x, weight.t()), alpha=scale)


def plan_for(x: torch.Tensor, weight: torch.Tensor, activation: Activation | None = None) -> Plan:
    """How a product of these shapes is computed."""
    rows = x.shape[0]
    if 0 < rows <= SIZES[-1] and use_triton(x) and weight.is_contiguous() and x.stride(1) == 1:
        return _plan(x.device, weight.dtype, rows_of_table(rows), *weight.shape, activation)
    return _TORCH


_TORCH = Plan("torch", {})


@functools.cache
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    outputs: int,
    inputs: int,
    activation: Activation | None,
) -> Plan:
    for kernel in KERNELS if dtype.itemsize == 2 else ():
        found = tuning.choice(
            device, f"gemm_{kernel}", *table_key(rows, outputs, inputs, activation)
        )
        if found is not None:
            return Plan(kernel, found)
    if rows == 1:
        return Plan("vector", gemm_vector.default_choice(outputs, inputs))
    return _TORCH


def rows_of_table(rows: int) -> int:
    """1, or the first of SIZES that holds so many."""
    return next(size for size in (1, *SIZES) if rows <= size)


def table_key(
    rows: int, outputs: int, inputs: int, activation: Activation | None
) -> tuple[int | str, ...]:
    """In the tables "gemm_vector", "gemm_split" and "gemm_torch"; rows: of `rows_of_table`."""
    return (rows, outputs, inputs, *(("swiglu",) if activation == "swiglu" else ()))


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor:
    if bias is not None:
        y = torch.addmm(bias, x, weight.t())
    elif dtype is not None and dtype != x.dtype and x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=dtype)
    else:
        y = torch.mm(x, weight.t())
    return y if dtype is None else y.to(dtype)
