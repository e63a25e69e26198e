"""Rotary position embedding, in the half-split ("NeoX") order of dimensions (Su et al. 2021)."""

import dataclasses
from typing import NamedTuple

import torch


class QkNorm(NamedTuple):
    """RMSNorm of each head of q and k; weight: [heads + kv_heads, head_dim]."""

    weight: torch.Tensor
    eps: float


@dataclasses.dataclass(frozen=True)
class RopeStep:
    """The rotations of one step's tokens.

    cos, sin: float32 [rows, 1, rotary_dim] of `rope_tables`; rotary_dim at most head_dim.
    positions: [tokens] int32 or int64, each token's row; None: row t is that of token t.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor | None


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for `apply_rope`, float32 [tokens, 1, rotary_dim]; once a step for all layers.

    positions: [tokens] int64; inverse_frequencies: [rotary_dim / 2] float32; `scale` multiplies
    both (YaRN's attention factor). The first half of sin is negated, so that `apply_rope` need not.
    """
    angles = positions[:, None, None].float() * inverse_frequencies
    cos, sin = angles.cos().mul_(scale), angles.sin().mul_(scale)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate all heads of x: [tokens, heads, head_dim]; same shape and dtype back.

    cos, sin: [tokens, 1, rotary_dim] of `rope_tables`; dimensions past rotary_dim stay as they are.
    Computed in float32.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        rotated = apply_rope(x[..., :rotary_dim], cos, sin)
        return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
