"""Llama, Mistral, Qwen2 and Qwen3: attention with rope and a gated MLP in every layer.

They differ in what the checkpoint has: biases, q and k norms, a sliding window on all or some
layers, tied embeddings.
"""

import torch

from tasuki_engine.layers.attention import Attention, AttentionShape
from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.mlp import GatedMlp
from tasuki_engine.layers.rope import Rope
from tasuki_engine.layers.step_plan import StepPlan, plan_step
from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.models.base import BaseModel, ModelContext
from tasuki_engine.step import Caches, CacheSpec, StepInput
from tasuki_kernels.norm import RmsNorm


class Dense(BaseModel):
    """A LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM checkpoint."""

    def __init__(self, context: ModelContext, weights: Weights) -> None:
        super().__init__(context, weights, "model.embed_tokens.weight", "lm_head.weight")
        config = context.config
        config.refuse("hidden_act", "silu")
        self.eps = float(config.get("rms_norm_eps", 1e-6))
        self.rope = Rope(config, context.device, context.max_model_len)
        shape = AttentionShape.of(config, self.eps)
        self.num_heads = shape.num_heads
        window = _window(config)
        self.layers: list[_Layer] = []
        counts = {False: 0, True: 0}
        for number, windowed in enumerate(_windowed_layers(config, window)):
            layer = _Layer(weights, f"model.layers.{number}", shape, counts[windowed], windowed)
            counts[windowed] += 1
            self.layers.append(layer)
        self.norm = RmsNorm(weights.take("model.norm.weight"), self.eps)
        self.cache_spec = CacheSpec(
            full=shape.spec(counts[False]),
            window=shape.spec(counts[True], window),
            state=None,
            kv_dtype=context.dtype,
        )

    def plan(self, step: StepInput, caches: Caches) -> StepPlan:
        """What all layers share of a step; makes no other use of the host's lists."""
        rope = self.rope.tables(step.positions)
        return plan_step(step, caches, self.cache_spec, self.num_heads, rope)

    @torch.inference_mode()
    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        """float32 logits [rows, vocab] of `step.logits_rows`; writes the step into the caches."""
        plan = self.plan(step, caches)
        hidden = self.embed(step.token_ids)
        for layer in self.layers:
            layer.add_to(hidden, plan)
        return self.logits(hidden, step.logits_rows, self.norm)


class _Layer:
    """Attention and MLP, each behind a norm."""

    def __init__(
        self, weights: Weights, prefix: str, shape: AttentionShape, index: int, windowed: bool
    ) -> None:
        self.windowed = windowed
        weights.drop(f"{prefix}.self_attn.rotary_emb.inv_freq")
        attention_norm, mlp_norm = (
            RmsNorm(weights.take(f"{prefix}.{name}_layernorm.weight"), shape.eps)
            for name in ("input", "post_attention")
        )
        self.attention = Attention(
            weights, f"{prefix}.self_attn", shape, index, shape.head_dim**-0.5, attention_norm
        )
        self.mlp = GatedMlp(
            Linear.load(weights, f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj", norm=mlp_norm),
            Linear.load(weights, f"{prefix}.mlp.down_proj"),
        )

    def add_to(self, hidden: torch.Tensor, plan: StepPlan) -> None:
        group = plan.window if self.windowed else plan.full
        assert group is not None
        self.attention.add_to(hidden, group, plan.rope)
        self.mlp.add_to(hidden, hidden)


def _window(config: ModelConfig) -> int | None:
    """Qwen's configs carry a window that only counts with `use_sliding_window`."""
    window = config.get("sliding_window", None)
    return int(window) if window and config.get("use_sliding_window", True) else None


def _windowed_layers(config: ModelConfig, window: int | None) -> list[bool]:
    layers = int(config.get("num_hidden_layers"))
    if window is None:
        return [False] * layers
    if config.get("layer_types", None):
        return [kind == "sliding_attention" for kind in config.layer_types()]
    first = int(config.get("max_window_layers", 0))
    return [number >= first for number in range(layers)]
