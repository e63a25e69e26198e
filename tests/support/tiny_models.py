"""Tiny random-weight checkpoints of every family, and what transformers computes with them.

The weights are drawn so that a lost token shows: attention is sharp, recurrent states decay slowly,
logits spread by several units. Built checkpoints look like published ones: safetensors, config,
tokenizer with a chat template, generation config.
"""

import copy
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoConfig, AutoModelForCausalLM, logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

VOCAB_SIZE = 384
SPECIAL_TOKENS = ["<|endoftext|>", "<|start|>", "<|end|>"]
EOS_TOKEN_ID = 0
END_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_TEXT = """The relay hands a prompt from one process to another. A block of keys and values is a
page of what was read; a state is what is remembered of it. When a page is known, nobody reads it
again. There are three things that last: tables, indexes, and the names of those who made them."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
}
_DENSE = {**_COMMON, "num_hidden_layers": 4, "intermediate_size": 96, "tie_word_embeddings": False}
_GRANITE = {
    **_COMMON,
    "num_hidden_layers": 5,
    "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
    "shared_intermediate_size": 96,
    "intermediate_size": 48,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "position_embedding_type": "nope",
    "tie_word_embeddings": True,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
    "embedding_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.5,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_DENSE, "rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("mistral", {**_DENSE, "sliding_window": 32, "head_dim": 16}),
    "qwen2": ("qwen2", {**_DENSE, "use_sliding_window": False}),
    "qwen3": ("qwen3", {**_DENSE, "head_dim": 32, "tie_word_embeddings": True}),
    "yarn": ("qwen3", {**_DENSE, "head_dim": 32, "rope_parameters": _YARN_ROPE}),
    "granite_hybrid": ("granitemoehybrid", _GRANITE),
    "granite_hybrid_rope": (
        "granitemoehybrid",
        {**_GRANITE, "position_embedding_type": "rope", "tie_word_embeddings": False},
    ),
    "granite_hybrid_moe": (
        "granitemoehybrid",
        {**_GRANITE, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            **_COMMON,
            "hybrid_override_pattern": "M-M*-M",
            "intermediate_size": 96,
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 24,
            "ssm_state_size": 16,
            "n_groups": 4,
            "chunk_size": 64,
            "time_step_min": 1e-9,
            "tie_word_embeddings": False,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def make(family: str, folder: Path, seed: int, **overrides: Any) -> Path:
    """The checkpoint of `family` with weights from `seed`, built in a subfolder of `folder` once.

    `overrides` replace fields of its transformers config. A folder shared by a test session is a
    cache: the same arguments give the same subfolder, also from parallel processes.
    """
    key = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
    target = Path(folder) / (f"{family}-{seed}" + (f"-{key}" if overrides else ""))
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    model_type, fields = _FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**fields, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, config, torch.Generator().manual_seed(seed))
    model.save_pretrained(work)
    _write_tokenizer(work)
    try:
        os.rename(work, target)
    except OSError:  # another process was faster
        shutil.rmtree(work)
    return target


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, config: Any, generator: torch.Generator) -> None:
    tied = bool(config.tie_word_embeddings)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        uniform = torch.rand(weight.shape, generator=generator)
        gain = 1.0 / math.sqrt(weight.shape[-1])
        if name.endswith("A_log"):
            value = torch.log(0.005 * 200.0**uniform)
        elif name.endswith("dt_bias"):
            value = torch.log(torch.expm1(0.02 * 25.0**uniform))
        elif name.endswith(".D") or "q_norm" in name or "k_norm" in name:
            value = 1.25 + 0.25 * noise
        elif "norm" in name:
            value = 1.0 + 0.2 * noise
        elif "embed" in name:
            value = (0.25 if tied else 1.0) * noise
        elif "lm_head" in name:
            value = 2.0 * gain * noise
        elif "conv1d.weight" in name:
            value = 0.5 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "q_proj" in name or "k_proj" in name:
            value = 1.5 * gain * noise
        elif "router" in name:
            value = 2.0 * gain * noise
        else:
            value = gain * noise
        weight.copy_(value)


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "bos_token": None,
        "add_bos_token": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    generation_config = {"eos_token_id": [EOS_TOKEN_ID, END_TOKEN_ID]}
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2))


@functools.lru_cache(maxsize=16)
def reference_model(folder: Path) -> Any:
    """transformers' model of the checkpoint: float32, on the CPU, its plainest attention."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """float32 [T, V]: row t holds the logits of the token after `token_ids[:t + 1]`.

    One full recompute without a cache, the only path in which transformers agrees with itself.
    """
    logits = reference_model(folder)(torch.tensor([token_ids]), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def reference_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """float32 [T, V]: row t holds the log-probabilities of the token after `token_ids[:t + 1]`."""
    return torch.log_softmax(reference_logits(folder, token_ids), dim=-1)


@torch.inference_mode()
def reference_spread(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """float32 [T]: how far log-probabilities move when the embeddings move in their last bit.

    Where weights and tokens amplify rounding, two right answers in float32 are that far apart.
    """
    model, expected = reference_model(folder), reference_logprobs(folder, token_ids)
    embedded = model.get_input_embeddings()(torch.tensor([token_ids]))
    generator, spread = torch.Generator().manual_seed(0), torch.zeros(len(token_ids))
    for _ in range(8):
        nudge = 1 + 2.0**-23 * (2 * torch.rand(embedded.shape, generator=generator) - 1)
        logits = model(inputs_embeds=embedded * nudge, use_cache=False).logits[0].float()
        moved = (torch.log_softmax(logits, dim=-1) - expected).abs().amax(dim=-1)
        spread = torch.maximum(spread, moved)
    return spread


@functools.lru_cache(maxsize=16)
def _reference_in_double(folder: Path) -> Any:
    # Experts one by one: transformers' grouped product takes no doubles.
    model = copy.deepcopy(reference_model(folder)).double()
    model.set_experts_implementation("eager")
    return model


@torch.inference_mode()
def reference_rounding(folder: Path, token_ids: list[int]) -> float:
    """How far transformers' own float32 log-probabilities are from those in double precision.

    Usually 2e-5. Where a draw of weights and tokens amplifies rounding to several times that, two
    right answers in float32 differ by as much: draw other tokens.
    """
    model = _reference_in_double(folder)
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    exact = torch.log_softmax(logits.double(), dim=-1)
    return float((reference_logprobs(folder, token_ids) - exact).abs().max())


@torch.inference_mode()
def routing_margin(folder: Path, token_ids: list[int]) -> float:
    """How close transformers comes to choosing another expert, anywhere; infinity without experts.

    It is the smallest difference between the router's logits of the last chosen and the first left
    out. Where it is near float32's noise (below 2e-5), two right answers differ: draw other tokens.
    """
    model = reference_model(folder)
    routers = [part for name, part in model.named_modules() if name.endswith(".router")]
    top_k = model.config.num_experts_per_tok if routers else 0
    margins = [math.inf]

    def note(router: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        logits = inputs[0].reshape(-1, inputs[0].shape[-1]) @ router.weight.T
        best = logits.topk(top_k + 1, dim=-1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    hooks = [router.register_forward_pre_hook(note) for router in routers]
    model(torch.tensor([token_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return min(margins)


def reference_greedy(folder: Path, prompt: list[int], n: int) -> list[int]:
    """The n tokens after `prompt` by full recompute at each; end tokens do not end it."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(reference_logprobs(folder, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
