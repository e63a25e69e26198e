"""Models of a configuration with random weights, made where they will lie: for benchmarks.

The names are those of published checkpoints. Values are such that activations stay finite and
states decay as trained ones do; they say nothing about texts.
"""

import math
from pathlib import Path

import torch

from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.models import ARCHITECTURES, Model
from tasuki_engine.models.base import ModelContext

Shapes = dict[str, tuple[int, ...]]


def build(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype | None = None,
) -> Model:
    """The model of `folder`/config.json; state_dtype: of SSM states, None: what it asks for."""
    fields = ModelConfig.read(folder)
    context = ModelContext(
        config=fields,
        folder=folder,
        revision="random",
        device=device,
        dtype=dtype,
        state_dtype=state_dtype,
        max_model_len=int(fields.get("max_position_embeddings")),
        eos_token_ids=(),
    )
    weights = Weights(tensors(fields, device, dtype), dtype, str(folder))
    with torch.inference_mode():
        model = ARCHITECTURES[fields.architecture](context, weights)
    weights.finish()
    return model


def tensors(
    fields: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every weight by its name."""
    return {name: _tensor(name, shape, device).to(dtype) for name, shape in shapes(fields).items()}


def shapes(fields: ModelConfig) -> Shapes:
    """Every weight of a Qwen3, Granite 4.0 or Nemotron-H checkpoint."""
    nemotron = fields.architecture == "NemotronHForCausalLM"
    root = "backbone" if nemotron else "model"
    hidden, vocab = int(fields.get("hidden_size")), int(fields.get("vocab_size"))
    embedding = "embeddings" if nemotron else "embed_tokens"
    found: Shapes = {
        f"{root}.{embedding}.weight": (vocab, hidden),
        f"{root}.{'norm_f' if nemotron else 'norm'}.weight": (hidden,),
    }
    if not fields.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (vocab, hidden)
    for number, kind in enumerate(fields.layer_types()):
        layer = _nemotron_layer(fields, kind) if nemotron else _layer(fields, kind)
        found |= {f"{root}.layers.{number}.{name}": shape for name, shape in layer.items()}
    return found


def _layer(fields: ModelConfig, kind: str) -> Shapes:
    """Mixer and gated MLP."""
    hidden, inner = int(fields.get("hidden_size")), int(fields.get("intermediate_size"))
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if fields.architecture == "GraniteMoeHybridForCausalLM":
        layer["shared_mlp.input_linear.weight"] = (2 * inner, hidden)
        layer["shared_mlp.output_linear.weight"] = (hidden, inner)
    else:
        for name in ("gate_proj", "up_proj"):
            layer[f"mlp.{name}.weight"] = (inner, hidden)
        layer["mlp.down_proj.weight"] = (hidden, inner)
    if kind == "mamba":
        heads, state = int(fields.get("mamba_n_heads")), int(fields.get("mamba_d_state"))
        inner, groups = heads * int(fields.get("mamba_d_head")), int(fields.get("mamba_n_groups"))
        kernel = int(fields.get("mamba_d_conv"))
        return layer | _mamba("mamba", hidden, inner, heads, groups * state, kernel)
    return layer | _attention("self_attn", fields)


def _nemotron_layer(fields: ModelConfig, kind: str) -> Shapes:
    """One mixer of any kind."""
    hidden = int(fields.get("hidden_size"))
    layer: Shapes = {"norm.weight": (hidden,)}
    if kind == "mamba":
        heads, groups = int(fields.get("mamba_num_heads")), int(fields.get("n_groups"))
        inner, state = heads * int(fields.get("mamba_head_dim")), int(fields.get("ssm_state_size"))
        kernel = int(fields.get("conv_kernel"))
        return layer | _mamba("mixer", hidden, inner, heads, groups * state, kernel)
    if kind == "attention":
        return layer | _attention("mixer", fields)
    inner = int(fields.get("intermediate_size"))
    return layer | {
        "mixer.up_proj.weight": (inner, hidden),
        "mixer.down_proj.weight": (hidden, inner),
    }


def _attention(prefix: str, fields: ModelConfig) -> Shapes:
    hidden, dim = int(fields.get("hidden_size")), fields.head_dim
    queries = int(fields.get("num_attention_heads")) * dim
    keys = int(fields.get("num_key_value_heads")) * dim
    found: Shapes = {
        f"{prefix}.q_proj.weight": (queries, hidden),
        f"{prefix}.k_proj.weight": (keys, hidden),
        f"{prefix}.v_proj.weight": (keys, hidden),
        f"{prefix}.o_proj.weight": (hidden, queries),
    }
    if fields.architecture == "Qwen3ForCausalLM":
        found |= {f"{prefix}.q_norm.weight": (dim,), f"{prefix}.k_norm.weight": (dim,)}
    return found


def _mamba(prefix: str, hidden: int, inner: int, heads: int, bc: int, kernel: int) -> Shapes:
    channels = inner + 2 * bc
    return {
        f"{prefix}.in_proj.weight": (inner + channels + heads, hidden),
        f"{prefix}.out_proj.weight": (hidden, inner),
        f"{prefix}.conv1d.weight": (channels, 1, kernel),
        f"{prefix}.conv1d.bias": (channels,),
        f"{prefix}.A_log": (heads,),
        f"{prefix}.D": (heads,),
        f"{prefix}.dt_bias": (heads,),
        f"{prefix}.norm.weight": (inner,),
    }


def _tensor(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if name.endswith(("norm.weight", "layernorm.weight", "norm_f.weight", ".D")):
        return torch.ones(shape, device=device)
    if name.endswith("A_log"):
        return torch.empty(shape, device=device).uniform_(1.0, 16.0).log_()
    if name.endswith("dt_bias"):
        return torch.full(shape, math.log(math.expm1(0.01)), device=device)
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02)
