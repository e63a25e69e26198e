"""Multi-head attention with grouped KV heads, over the paged cache."""

import dataclasses

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.step import AttentionSpec
from tasuki_kernels.attention import AttentionPlan, attend
from tasuki_kernels.norm import RmsNorm
from tasuki_kernels.rope import QkNorm, RopeStep


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
    """Norm; fused q, k, v projection; norm of q and k and rope where the model has them; attention;
    output projection.

    layer: index among the layers of its cache group. scale: of the scores.
    """

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        shape: AttentionShape,
        layer: int,
        scale: float,
        norm: RmsNorm,
    ) -> None:
        self.shape = shape
        self.layer = layer
        self.scale = scale
        self.qkv = Linear.load(weights, *(f"{prefix}.{part}_proj" for part in "qkv"), norm=norm)
        self.out = Linear.load(weights, f"{prefix}.o_proj")
        self.qk_norm: QkNorm | None = None
        if f"{prefix}.q_norm.weight" in weights:
            q_norm = weights.take(f"{prefix}.q_norm.weight").expand(shape.num_heads, -1)
            k_norm = weights.take(f"{prefix}.k_norm.weight").expand(shape.num_kv_heads, -1)
            self.qk_norm = QkNorm(torch.cat((q_norm, k_norm)), shape.eps)

    def add_to(
        self,
        hidden: torch.Tensor,
        plan: AttentionPlan,
        rope: RopeStep | None,
        scale: float = 1.0,
    ) -> None:
        """hidden += scale * attention(norm(hidden)); hidden: [tokens, hidden size]."""
        rows = self.shape.num_heads + 2 * self.shape.num_kv_heads
        qkv = self.qkv(hidden).view(hidden.shape[0], rows, self.shape.head_dim)
        attended = attend(qkv, plan, self.layer, self.scale, norm=self.qk_norm, rope=rope)
        self.out.add_to(hidden, attended, scale)
