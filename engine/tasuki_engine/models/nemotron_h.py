"""Nemotron-H: one mixer per layer, which is Mamba2, attention without rope, or a relu^2 MLP."""

import torch

from tasuki_common.errors import ConfigError
from tasuki_engine.layers.attention import Attention, AttentionShape
from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.mamba2 import Mamba2, Mamba2Shape
from tasuki_engine.layers.mlp import Relu2Mlp
from tasuki_engine.layers.step_plan import StepPlan, plan_step
from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.models.base import BaseModel, ModelContext
from tasuki_engine.step import Caches, CacheSpec, StepInput
from tasuki_kernels.norm import RmsNorm


class NemotronH(BaseModel):
    """A NemotronHForCausalLM checkpoint (without experts)."""

    def __init__(self, context: ModelContext, weights: Weights) -> None:
        root = "backbone" if "backbone.embeddings.weight" in weights else "model"
        super().__init__(context, weights, f"{root}.embeddings.weight", "lm_head.weight")
        config = context.config
        config.refuse("mlp_hidden_act", "relu2")
        config.refuse("mamba_hidden_act", "silu")
        self.eps = float(config.get("layer_norm_epsilon", 1e-5))
        attention = AttentionShape.of(config, self.eps)
        mamba = _mamba_shape(config, self.eps)
        self.num_heads = attention.num_heads
        self.layers: list[Mamba2 | Attention | Relu2Mlp] = []
        counts = {"mamba": 0, "attention": 0, "mlp": 0}
        for number, kind in enumerate(config.layer_types()):
            prefix = f"{root}.layers.{number}"
            norm = RmsNorm(weights.take(f"{prefix}.norm.weight"), self.eps)
            mixer: Mamba2 | Attention | Relu2Mlp
            if kind == "mamba":
                mixer = Mamba2(weights, f"{prefix}.mixer", mamba, counts[kind], norm)
            elif kind == "attention":
                scale = attention.head_dim**-0.5
                mixer = Attention(weights, f"{prefix}.mixer", attention, counts[kind], scale, norm)
            elif kind == "mlp":
                mixer = Relu2Mlp(
                    Linear.load(weights, f"{prefix}.mixer.up_proj", norm=norm),
                    Linear.load(weights, f"{prefix}.mixer.down_proj"),
                )
            else:
                raise ConfigError(f"layer {number} is of type {kind}, which Nemotron-H lacks here.")
            counts[kind] += 1
            self.layers.append(mixer)
        self.norm = RmsNorm(weights.take(f"{root}.norm_f.weight"), self.eps)
        ssm_dtype = context.state_dtype or config.dtype_of("mamba_ssm_cache_dtype", "float32")
        self.cache_spec = CacheSpec(
            full=attention.spec(counts["attention"]),
            window=None,
            state=mamba.spec(counts["mamba"], context.dtype, ssm_dtype),
            kv_dtype=context.dtype,
        )

    def plan(self, step: StepInput, caches: Caches) -> StepPlan:
        """What all layers share of a step; makes no other use of the host's lists."""
        return plan_step(step, caches, self.cache_spec, self.num_heads, None)

    @torch.inference_mode()
    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        """float32 logits [rows, vocab] of `step.logits_rows`; writes the step into the caches."""
        plan = self.plan(step, caches)
        hidden = self.embed(step.token_ids)
        for layer in self.layers:
            match layer:
                case Mamba2():
                    assert plan.state is not None
                    layer.add_to(hidden, plan.state)
                case Attention():
                    assert plan.full is not None
                    layer.add_to(hidden, plan.full, None)
                case Relu2Mlp():
                    layer.add_to(hidden, hidden)
        return self.logits(hidden, step.logits_rows, self.norm)


def _mamba_shape(config: ModelConfig, eps: float) -> Mamba2Shape:
    return Mamba2Shape(
        num_heads=int(config.get("mamba_num_heads")),
        head_dim=int(config.get("mamba_head_dim")),
        state_size=int(config.get("ssm_state_size")),
        groups=int(config.get("n_groups", config.get("mamba_n_groups", 1))),
        conv_kernel=int(config.get("conv_kernel", config.get("mamba_d_conv", 4))),
        eps=eps,
        dt_limits=config.time_step_limit(),
    )
