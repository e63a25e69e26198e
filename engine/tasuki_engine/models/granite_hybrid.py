"""GraniteMoeHybrid (Granite 4.0): Mamba2 and attention mixers, each followed by an MLP.

The MLP is a shared one, plus sparse experts in the MoE variant; embedding, attention, residual and
logits have multipliers; positions come from the recurrent layers alone (NoPE) or from rope.
"""

import torch

from tasuki_engine.layers.attention import Attention, AttentionShape
from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.mamba2 import Mamba2, Mamba2Shape
from tasuki_engine.layers.mlp import GatedMlp
from tasuki_engine.layers.moe import SparseMoe
from tasuki_engine.layers.rope import Rope
from tasuki_engine.layers.step_plan import StepPlan, plan_step
from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.models.base import BaseModel, ModelContext
from tasuki_engine.step import Caches, CacheSpec, StepInput
from tasuki_kernels.norm import RmsNorm


class GraniteHybrid(BaseModel):
    """A GraniteMoeHybridForCausalLM checkpoint."""

    def __init__(self, context: ModelContext, weights: Weights) -> None:
        super().__init__(context, weights, "model.embed_tokens.weight", "lm_head.weight")
        config = context.config
        config.refuse("hidden_act", "silu")
        self.eps = float(config.get("rms_norm_eps", 1e-6))
        self.embedding_multiplier = float(config.get("embedding_multiplier", 1.0))
        self.residual_multiplier = float(config.get("residual_multiplier", 1.0))
        uses_rope = config.get("position_embedding_type", None) == "rope"
        self.rope = Rope(config, context.device, context.max_model_len) if uses_rope else None
        attention = AttentionShape.of(config, self.eps)
        mamba = _mamba_shape(config, self.eps)
        self.num_heads = attention.num_heads
        self.layers: list[_Layer] = []
        counts = {"mamba": 0, "attention": 0}
        for number, kind in enumerate(config.layer_types()):
            prefix = f"model.layers.{number}"
            norm = RmsNorm(weights.take(f"{prefix}.input_layernorm.weight"), self.eps)
            mixer: Mamba2 | Attention
            if kind == "mamba":
                mixer = Mamba2(weights, f"{prefix}.mamba", mamba, counts[kind], norm)
            else:
                scale = float(config.get("attention_multiplier", 1.0))
                mixer = Attention(
                    weights, f"{prefix}.self_attn", attention, counts[kind], scale, norm
                )
            counts[kind] += 1
            self.layers.append(_Layer(weights, config, prefix, mixer, self.eps))
        # The head is linear: to divide before it costs nothing, to divide logits a pass over them.
        weight = weights.take("model.norm.weight", torch.float32)
        self.norm = RmsNorm(weight / float(config.get("logits_scaling", 1.0)), self.eps)
        self.cache_spec = CacheSpec(
            full=attention.spec(counts["attention"]),
            window=None,
            state=mamba.spec(counts["mamba"], context.dtype, context.state_dtype or torch.float32),
            kv_dtype=context.dtype,
        )

    def plan(self, step: StepInput, caches: Caches) -> StepPlan:
        """What all layers share of a step; makes no other use of the host's lists."""
        rope = self.rope.tables(step.positions) if self.rope else None
        return plan_step(step, caches, self.cache_spec, self.num_heads, rope)

    @torch.inference_mode()
    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        """float32 logits [rows, vocab] of `step.logits_rows`; writes the step into the caches."""
        plan = self.plan(step, caches)
        hidden = self.embed(step.token_ids).mul_(self.embedding_multiplier)
        for layer in self.layers:
            layer.add_to(hidden, plan, self.residual_multiplier)
        return self.logits(hidden, step.logits_rows, self.norm)


class _Layer:
    """One mixer and one MLP, each behind a norm and scaled into the residual."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        prefix: str,
        mixer: Mamba2 | Attention,
        eps: float,
    ) -> None:
        self.mixer = mixer
        mlp_norm = RmsNorm(weights.take(f"{prefix}.post_attention_layernorm.weight"), eps)
        sparse = config.get("num_local_experts", 0)
        # With experts several products read it: it is computed once, before them.
        self.norm = mlp_norm if sparse else None
        self.mlp = GatedMlp(
            Linear.load(
                weights, f"{prefix}.shared_mlp.input_linear", norm=None if sparse else mlp_norm
            ),
            Linear.load(weights, f"{prefix}.shared_mlp.output_linear"),
        )
        self.moe: SparseMoe | None = None
        if sparse:
            self.moe = SparseMoe(
                weights.take(f"{prefix}.block_sparse_moe.router.layer.weight"),
                weights.take(f"{prefix}.block_sparse_moe.input_linear.weight"),
                weights.take(f"{prefix}.block_sparse_moe.output_linear.weight"),
                int(config.get("num_experts_per_tok")),
            )

    def add_to(self, hidden: torch.Tensor, plan: StepPlan, scale: float) -> None:
        if isinstance(self.mixer, Mamba2):
            assert plan.state is not None
            self.mixer.add_to(hidden, plan.state, scale)
        else:
            assert plan.full is not None
            self.mixer.add_to(hidden, plan.full, plan.rope, scale)
        x = self.norm(hidden) if self.norm else hidden
        self.mlp.add_to(hidden, x, scale)
        if self.moe:
            self.moe.add_to(hidden, x, scale)


def _mamba_shape(config: ModelConfig, eps: float) -> Mamba2Shape:
    heads = int(config.get("mamba_n_heads", 128))
    head_dim = config.get("mamba_d_head", "auto")
    if head_dim == "auto":
        head_dim = int(config.get("mamba_expand", 2)) * int(config.get("hidden_size")) // heads
    return Mamba2Shape(
        num_heads=heads,
        head_dim=int(head_dim),
        state_size=int(config.get("mamba_d_state", 256)),
        groups=int(config.get("mamba_n_groups", 1)),
        conv_kernel=int(config.get("mamba_d_conv", 4)),
        eps=eps,
        dt_limits=config.time_step_limit(),
    )
