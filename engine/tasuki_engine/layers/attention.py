"""Multi-head attention with grouped KV heads, over the paged cache."""

import dataclasses

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.step_plan import AttentionStep
from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.step import AttentionSpec
from tasuki_kernels.attention import paged_attention
from tasuki_kernels.kv_write import write_kv
from tasuki_kernels.norm import rms_norm
from tasuki_kernels.rope import apply_rope


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes that all attention layers of a model share; eps is that of the q and k norms."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float

    @classmethod
    def of(cls, config: ModelConfig, eps: float) -> "AttentionShape":
        """From the fields' usual names."""
        heads = int(config.get("num_attention_heads"))
        kv_heads = int(config.get("num_key_value_heads", heads))
        return cls(heads, kv_heads, config.head_dim, eps)

    def spec(self, layers: int, window: int | None = None) -> AttentionSpec | None:
        """What `layers` such layers need cached; None for none."""
        if not layers:
            return None
        return AttentionSpec(layers, self.num_kv_heads, self.head_dim, window)


class Attention:
    """Fused q, k, v projection; norm of q and k and rope where the model has them; attention; out.

    layer: index among the layers of its cache group. scale: of the scores.
    """

    def __init__(
        self, weights: Weights, prefix: str, shape: AttentionShape, layer: int, scale: float
    ) -> None:
        self.shape = shape
        self.layer = layer
        self.scale = scale
        self.qkv = Linear.load(weights, *(f"{prefix}.{part}_proj" for part in "qkv"))
        self.out = Linear.load(weights, f"{prefix}.o_proj")
        self.qk_norm: torch.Tensor | None = None
        if f"{prefix}.q_norm.weight" in weights:
            q_norm = weights.take(f"{prefix}.q_norm.weight").expand(shape.num_heads, -1)
            k_norm = weights.take(f"{prefix}.k_norm.weight").expand(shape.num_kv_heads, -1)
            self.qk_norm = torch.cat((q_norm, k_norm))

    def add_to(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        group: AttentionStep,
        rope: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float = 1.0,
    ) -> None:
        """residual += scale * attention(x); x, residual: [tokens, hidden]."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], heads + 2 * kv_heads, self.shape.head_dim)
        if self.qk_norm is not None or rope is not None:
            rotated = qkv[:, : heads + kv_heads]
            if self.qk_norm is not None:
                rotated = rms_norm(rotated, self.qk_norm, self.shape.eps)
            if rope is not None:
                rotated = apply_rope(rotated, *rope)
            qkv[:, : heads + kv_heads] = rotated
        kv = qkv[:, heads:].view(x.shape[0], 2, kv_heads, self.shape.head_dim)
        write_kv(group.cache, self.layer, group.write_rows, kv)
        attended = paged_attention(qkv[:, :heads], group.plan, self.layer, self.scale)
        self.out.add_to(residual, attended, scale)
