"""RMSNorm, plain and gated by groups (Zhang & Sennrich 2019; the gated form is Mamba2's)."""

import functools

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dimension, computed in float32.

    x: [..., d], any dtype; weight: [d] (or broadcastable to x). Reads and writes x once.
    """
    if x.dtype != torch.float32:
        return (_normalize(x.float(), eps) * weight.float()).to(x.dtype)
    return _normalize(x, eps).mul_(weight)


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, groups: int
) -> torch.Tensor:
    """RMSNorm of x * silu(gate) within each of `groups` equal parts of the last dimension.

    x, gate: [tokens, d]; weight: [d]; returns [tokens, d] in the gate's dtype. The gate acts before
    the norm (`norm_before_gate=False` in Mamba2's reference).
    """
    gated = F.silu(gate.float()).mul_(x)
    parts = gated if groups == 1 else gated.view(len(gated), groups, -1)
    return _normalize(parts, eps).view_as(gated).to(gate.dtype).mul_(weight)


def _normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    # x * sqrt(d) / sqrt(sum(x**2) + d * eps), in three operations: hypot adds the squares.
    size = x.shape[-1]
    zero, floor = _constants(size * eps, x.device)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)
    return torch.addcdiv(zero, x, norm, value=size**0.5)


@functools.cache
def _constants(floor_squared: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros((), device=device), torch.tensor(floor_squared**0.5, device=device)
