"""Attention over a paged KV cache, with all that comes between its two matrix products.

What is the same for all layers is planned once a step: `plan`; then `attend` per layer normalises
and rotates q and k, writes K and V into the cache, and attends. A step may mix decodes (one query
each) and ragged chunks.
"""

import dataclasses

import torch

from tasuki_kernels import (
    attention_decode,
    attention_prefill,
    attention_reference,
    kv_write,
    qk_prepare,
)
from tasuki_kernels.attention_reference import ReferencePlan
from tasuki_kernels.backend import use_triton
from tasuki_kernels.norm import rms_norm
from tasuki_kernels.rope import QkNorm, RopeStep, apply_rope


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """A step's decodes and chunks for the Triton kernels; either may be missing."""

    cache: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    decode: attention_decode.DecodePlan | None
    prefill: attention_prefill.PrefillPlan | None


AttentionPlan = ReferencePlan | KernelPlan


def plan(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_lens: torch.Tensor,
    query_lens: list[int],
    context_lens_host: list[int],
    num_decodes: int,
    window: int | None,
    group: int,
    plain: bool = True,
) -> AttentionPlan:
    """Plan one step for all layers of `cache`.

    cache: [blocks, layers, 2, kv_heads, block_size, head_dim], each block contiguous.
    block_table: [seqs, max_blocks] int32; entries past the context or behind the window are not
    read. slot_mapping: [tokens] int64, block * block_size + offset of each token's place.
    context_lens: [seqs] int32, as on the host in `context_lens_host`; the queries are the last
    tokens of the context. The first `num_decodes` sequences have one query each.
    window: keys a query sees, itself included; None: all. group: query heads per KV head.
    plain: `attend` will get neither softcap nor sinks.

    With kernels the host's lists are read for the chunks alone, and a step of decodes is planned
    without them by one launch, which a CUDA graph may hold; context length 0 marks a padded row,
    whose K and V go to its slot_mapping and whose result is zero.
    """
    if not use_triton(cache):
        return attention_reference.plan(
            cache, block_table, slot_mapping, query_lens, context_lens_host, num_decodes, window,
            group,
        )  # fmt: skip
    decode = prefill = None
    if num_decodes:
        decode = attention_decode.plan(
            cache, block_table, slot_mapping, context_lens, num_decodes, window, group
        )
    if len(query_lens) > num_decodes:
        row, chunks = num_decodes, []
        for seq in range(num_decodes, len(query_lens)):
            length = query_lens[seq]
            chunks.append(attention_prefill.Chunk(seq, row, length, context_lens_host[seq]))
            row += length
        prefill = attention_prefill.plan(cache, block_table, chunks, window, group, plain)
    return KernelPlan(cache, slot_mapping, num_decodes, decode, prefill)


def attend(
    qkv: torch.Tensor,
    plan: AttentionPlan,
    layer: int,
    scale: float,
    *,
    norm: QkNorm | None = None,
    rope: RopeStep | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer's attention, from the product with the qkv weights to that with the output's.

    qkv: [tokens, heads + 2 * kv_heads, head_dim], each token's row contiguous, heads of one KV head
    adjacent; changed in place. scale: of the scores, positive. softcap: scores are squeezed into
    (-softcap, softcap). sinks: [heads], the score of one more key per head whose value is zero.
    Returns [tokens, heads * head_dim]; norms, rotations and softmax in float32.
    """
    if isinstance(plan, ReferencePlan):
        return _attend_reference(qkv, plan, layer, scale, norm, rope, softcap, sinks)
    tokens, rows, head_dim = qkv.shape
    kv_heads = plan.cache.shape[3]
    options = softcap, sinks
    if plan.prefill is not None:
        qk_prepare.prepare(qkv, plan.cache, plan.slot_mapping, layer, norm, rope, plan.num_decodes)
        if plan.prefill.is_one_dense(tokens):
            return attention_prefill.attend_dense(
                qkv, kv_heads, scale, plan.prefill.dense[0].prompts
            )
    out = qkv.new_empty(tokens, (rows - 2 * kv_heads) * head_dim)
    if plan.decode is not None:
        attention_decode.attend(
            qkv, plan.cache, plan.decode, layer, scale, out, norm, rope, *options
        )
    if plan.prefill is not None:
        attention_prefill.attend(qkv, plan.cache, plan.prefill, layer, scale, out, *options)
    return out


def _attend_reference(
    qkv: torch.Tensor,
    plan: ReferencePlan,
    layer: int,
    scale: float,
    norm: QkNorm | None,
    rope: RopeStep | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    tokens, rows, head_dim = qkv.shape
    kv_heads = plan.cache.shape[3]
    heads = rows - 2 * kv_heads
    if norm is not None or rope is not None:
        rotated = qkv[:, : heads + kv_heads]
        if norm is not None:
            rotated = rms_norm(rotated, norm.weight, norm.eps)
        if rope is not None:
            rotated = apply_rope(rotated, rope.cos, rope.sin)
        qkv[:, : heads + kv_heads] = rotated
    kv = qkv[:, heads:].view(tokens, 2, kv_heads, head_dim)
    kv_write.write_kv(plan.cache, layer, plan.write_rows, kv)
    return attention_reference.paged_attention(qkv[:, :heads], plan, layer, scale, softcap, sinks)
