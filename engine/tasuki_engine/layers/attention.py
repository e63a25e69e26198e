"""Multi-head attention with grouped KV heads, over the paged cache."""

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.step_plan import AttentionStep
from tasuki_kernels.attention import paged_attention
from tasuki_kernels.kv_write import write_kv
from tasuki_kernels.norm import rms_norm
from tasuki_kernels.rope import apply_rope


class Attention:
    """Fused q, k, v projection; norm of q and k and rope where the model has them; attention; out.

    qk_norm: weights [heads + kv_heads, head_dim] of the per-head RMSNorm, or None.
    layer: index among the layers of its cache group.
    """

    def __init__(
        self,
        *,
        qkv: Linear,
        out: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        scale: float,
        qk_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.layer = layer
        self.scale = scale
        self.qk_norm = qk_norm
        self.eps = eps

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        group: AttentionStep,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float = 1.0,
    ) -> None:
        """residual += scale * attention(x); x, residual: [tokens, hidden]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], heads + 2 * kv_heads, self.head_dim)
        if self.qk_norm is not None or rope is not None:
            rotated = qkv[:, : heads + kv_heads]
            if self.qk_norm is not None:
                rotated = rms_norm(rotated, self.qk_norm, self.eps)
            if rope is not None:
                rotated = apply_rope(rotated, *rope)
            qkv[:, : heads + kv_heads] = rotated
        kv = qkv[:, heads:].unflatten(1, (2, kv_heads))
        write_kv(group.cache, self.layer, group.write_rows, kv)
        attended = paged_attention(qkv[:, :heads], group.plan, self.layer, self.scale)
        self.out.add_to(residual, attended, scale)
