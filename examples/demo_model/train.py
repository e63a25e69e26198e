"""Train the demo model on one GPU and write it as a Hugging Face checkpoint.

    python train.py --corpus FOLDER --out FOLDER [--minutes 6]

A GraniteMoeHybrid of 7 M parameters (6 Mamba2 and 2 attention layers, no positions). The model
below is the architecture in its training form (whole sequences, no cache); `--check` compares it
with transformers.
Optimiser: AdamW with warm-up and linear decay over the minutes given, bfloat16 autocast.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, LAYERS, VOCABULARY, INNER_MLP = 256, 8, 4096, 512
ATTENTION_LAYERS = (2, 6)
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 32
SSM_HEADS, SSM_HEAD_DIM, STATE, CONV = 8, 64, 64, 4
INNER = SSM_HEADS * SSM_HEAD_DIM
CONV_DIM = INNER + 2 * STATE
EMBEDDING_MULTIPLIER, RESIDUAL_MULTIPLIER, LOGITS_SCALING = 8.0, 0.5, 4.0
CHUNK, SEQUENCE, BATCH = 128, 2048, 48
EPS = 1e-6
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def segment_sums(a: Tensor) -> Tensor:
    """[..., T] -> [..., T, T]: entry (i, j) is a[j+1] + ... + a[i], -inf above the diagonal."""
    sums = a.cumsum(-1)
    differences = sums[..., :, None] - sums[..., None, :]
    lower = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    return differences.masked_fill(~lower, -torch.inf)


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The state-space dual form of Mamba2 (arXiv 2405.21060, listing 1), one group.

    x: [batch, tokens, heads, head_dim]; dt: [batch, tokens, heads], after softplus;
    a: [heads], negative; b, c: [batch, tokens, state]. Tokens must be a multiple of CHUNK.
    """
    batch, tokens, heads, _ = x.shape
    chunks = tokens // CHUNK
    decay = (dt * a).view(batch, chunks, CHUNK, heads).permute(0, 3, 1, 2).float()
    x = (x * dt[..., None].to(x.dtype)).view(batch, chunks, CHUNK, heads, -1)
    b, c = b.view(batch, chunks, CHUNK, -1), c.view(batch, chunks, CHUNK, -1)
    sums = decay.cumsum(-1)
    within = segment_sums(decay).exp().to(x.dtype)  # [batch, heads, chunks, CHUNK, CHUNK]
    scores = (c @ b.transpose(-1, -2))[:, None] * within
    y = torch.einsum("bhcls,bcshp->bclhp", scores, x)
    to_end = (sums[..., -1:] - sums).exp().to(x.dtype)
    states = torch.einsum("bcsn,bhcs,bcshp->bchpn", b, to_end, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    across = segment_sums(F.pad(sums[..., -1], (1, 0))).exp().to(x.dtype)
    states = torch.einsum("bhzc,bchpn->bzhpn", across, states)[:, :-1]
    y = y + torch.einsum("bcln,bchpn,bhcl->bclhp", c, states, sums.exp().to(x.dtype))
    return y.reshape(batch, tokens, heads, -1)


class Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return (wide * self.weight).to(x.dtype)


class Mamba(nn.Module):
    """Mamba2 mixer; parameter names are those of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, INNER + CONV_DIM + SSM_HEADS, bias=False)
        self.conv1d = nn.Conv1d(CONV_DIM, CONV_DIM, CONV, groups=CONV_DIM, padding=CONV - 1)
        dt = torch.exp(torch.linspace(math.log(1e-3), math.log(1e-1), SSM_HEADS))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.arange(1, SSM_HEADS + 1).float().log())
        self.D = nn.Parameter(torch.ones(SSM_HEADS))
        self.norm = Norm(INNER)
        self.out_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, HIDDEN] -> the same."""
        batch, tokens, _ = hidden.shape
        gate, xbc, dt = self.in_proj(hidden).split([INNER, CONV_DIM, SSM_HEADS], dim=-1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2))[..., :tokens].transpose(1, 2))
        x, b, c = xbc.split([INNER, STATE, STATE], dim=-1)
        x = x.reshape(batch, tokens, SSM_HEADS, SSM_HEAD_DIM)
        dt = F.softplus(dt.float() + self.dt_bias)
        y = scan(x, dt, -self.A_log.float().exp(), b, c) + x * self.D.to(x.dtype)[:, None]
        y = y.reshape(batch, tokens, INNER) * F.silu(gate)
        return self.out_proj(self.norm(y))


class Attention(nn.Module):
    """Grouped-query attention without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, HIDDEN] -> the same."""
        batch, tokens, _ = hidden.shape
        q, k, v = (
            projection(hidden).view(batch, tokens, -1, HEAD_DIM).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class SharedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.input_linear = nn.Linear(HIDDEN, 2 * INNER_MLP, bias=False)
        self.output_linear = nn.Linear(INNER_MLP, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., HIDDEN] -> the same."""
        gate, up = self.input_linear(hidden).chunk(2, dim=-1)
        return self.output_linear(F.silu(gate) * up)


class Layer(nn.Module):
    """Mixer and MLP, each behind a norm and beside a scaled residual."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(HIDDEN)
        if index in ATTENTION_LAYERS:
            self.self_attn: nn.Module = Attention()
        else:
            self.mamba: nn.Module = Mamba()
        self.post_attention_layernorm = Norm(HIDDEN)
        self.shared_mlp = SharedMLP()
        self.attends = index in ATTENTION_LAYERS

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, HIDDEN] -> the same."""
        mixer = self.self_attn if self.attends else self.mamba
        hidden = hidden + RESIDUAL_MULTIPLIER * mixer(self.input_layernorm(hidden))
        mlp = self.shared_mlp(self.post_attention_layernorm(hidden))
        return hidden + RESIDUAL_MULTIPLIER * mlp


class Model(nn.Module):
    """The whole model; `state_dict()` has the checkpoint's names under `model.`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))
        self.norm = Norm(HIDDEN)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=HIDDEN**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens] -> logits [batch, tokens, VOCABULARY]."""
        hidden = self.embed_tokens(tokens) * EMBEDDING_MULTIPLIER
        for layer in self.layers:
            hidden = layer(hidden)
        return F.linear(self.norm(hidden), self.embed_tokens.weight) / LOGITS_SCALING


def config() -> dict[str, object]:
    """The checkpoint's config.json."""
    kinds = ["attention" if i in ATTENTION_LAYERS else "mamba" for i in range(LAYERS)]
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "attention_bias": False,
        "attention_multiplier": HEAD_DIM**-0.5,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 4,
        "dtype": "bfloat16",
        "embedding_multiplier": EMBEDDING_MULTIPLIER,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": HIDDEN**-0.5,
        "intermediate_size": INNER_MLP,
        "layer_types": kinds,
        "logits_scaling": LOGITS_SCALING,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_d_conv": CONV,
        "mamba_d_head": SSM_HEAD_DIM,
        "mamba_d_state": STATE,
        "mamba_expand": INNER // HIDDEN,
        "mamba_n_groups": 1,
        "mamba_n_heads": SSM_HEADS,
        "mamba_proj_bias": False,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 0,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": 0,
        "position_embedding_type": "nope",
        "residual_multiplier": RESIDUAL_MULTIPLIER,
        "rms_norm_eps": EPS,
        "shared_intermediate_size": INNER_MLP,
        "tie_word_embeddings": True,
        "vocab_size": VOCABULARY,
    }


def write(model: Model, corpus: Path, out: Path) -> None:
    """Write the checkpoint, its tokenizer and its chat template to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    precise = ("A_log", "dt_bias", ".D")
    weights = {
        f"model.{name}": value.float() if name.endswith(precise) else value.bfloat16()
        for name, value in model.state_dict().items()
    }
    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, out / "model.safetensors")
    (out / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (out / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.7}
    (out / "generation_config.json").write_text(json.dumps(generation | {"top_p": 0.9}) + "\n")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    tokenizer |= {"pad_token": "<|pad|>", "model_max_length": 4096}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy of [batch, SEQUENCE + 1] ids, in nats."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor) -> float:
    """Over all full sequences of the held-out ids, in nats a token."""
    rows = ids[: len(ids) // (SEQUENCE + 1) * (SEQUENCE + 1)].view(-1, SEQUENCE + 1)
    rows = rows[: len(rows) // BATCH * BATCH]  # one compiled shape
    losses = [loss_of(model, part.long()).item() for part in rows.split(BATCH)]
    return sum(losses) / len(losses)


def train(corpus: Path, out: Path, minutes: float) -> None:
    """Train for `minutes`, report the held-out perplexity, write the checkpoint."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    ids, held_out = (
        torch.from_numpy(
            np.fromfile(corpus / f"{name}.bin", dtype=np.uint16).astype(np.int32)
        ).cuda()
        for name in ("train", "held_out")
    )
    model = Model().cuda()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens",
        flush=True,
    )
    flat = [p for p in model.parameters() if p.ndim < 2]
    wide = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)
    offsets = torch.arange(SEQUENCE + 1, device="cuda")
    start, step, seen, done = time.monotonic(), 0, 0, 0.0
    while done < 1.0:
        rate = min(1.0, (step + 1) / 200) * min(1.0, max(0.02, (1 - done) / 0.7))
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * rate
        at = torch.randint(len(ids) - SEQUENCE - 1, (BATCH, 1), device="cuda")
        loss = loss_of(compiled, ids[at + offsets].long())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + BATCH * SEQUENCE
        if step == 20:  # compilation does not count
            torch.cuda.synchronize()
            start = time.monotonic()
        if step > 20 and step % 20 == 0:
            torch.cuda.synchronize()
            done = (time.monotonic() - start) / (60 * minutes)
        if step % 200 == 0:
            print(f"step {step} tokens {seen:,} loss {loss.item():.3f} done {done:.2f}", flush=True)
    nats = held_out_loss(compiled, held_out)
    write(model, corpus, out)
    report = {"tokens_seen": seen, "held_out_nats": nats, "held_out_perplexity": math.exp(nats)}
    report |= {"steps": step, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(report)


def check(corpus: Path, out: Path) -> None:
    """Write random weights to `out`, and compare this model with transformers in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = Model()
    write(model, corpus, out)
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    names = {k.removeprefix("model."): v for k, v in reference.state_dict().items()}
    model.load_state_dict({k: names[k] for k in model.state_dict()})
    tokens = torch.randint(VOCABULARY, (2, 2 * CHUNK))
    with torch.no_grad():
        mine, theirs = (F.log_softmax(x, -1) for x in (model(tokens), reference(tokens).logits))
    print(f"largest difference of log-probabilities: {(mine - theirs).abs().max():.2e}")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--check", action="store_true", help="only compare with transformers")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.corpus, arguments.out)
    else:
        train(arguments.corpus, arguments.out, arguments.minutes)


if __name__ == "__main__":
    main()
