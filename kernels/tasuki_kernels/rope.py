"""Rotary position embedding, in the half-split ("NeoX") order of dimensions (Su et al. 2021)."""

import torch


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

    cos, sin: [tokens, 1, head_dim] of `rope_tables`. Computed in float32.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
