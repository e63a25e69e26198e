"""Attention over a paged KV cache in torch: one query per sequence and ragged chunks alike.

What CPUs run, and what the kernels are held to. K and V of the step's tokens are written before,
so everything is read from the cache.
"""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tasuki_kernels import kv_write

MAX_BIAS_ELEMENTS = 1 << 26
"""Of one part: a long chunk of a long context is attended some queries at a time."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """`count` sequences of `queries` tokens each, in the query rows `tokens`.

    gather: flat int64 [2 * count * kv_heads * blocks], rows of the cache at layer 0.
    bias: [count, 1, 1 or group * queries, keys], 0 where a key is seen, else minus infinity.
    """

    tokens: slice | torch.Tensor
    count: int
    queries: int
    gather: torch.Tensor
    bias: torch.Tensor


@dataclasses.dataclass(frozen=True)
class ReferencePlan:
    """Which rows of the cache a step writes and each sequence reads.

    rows: the cache as [blocks * layers * 2 * kv_heads, block_size * head_dim], the same memory.
    """

    cache: torch.Tensor
    write_rows: tuple[torch.Tensor, torch.Tensor]
    rows: torch.Tensor
    parts: list[_Part]


def plan(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_lens: list[int],
    context_lens: list[int],
    num_decodes: int,
    window: int | None,
    group: int,
) -> ReferencePlan:
    """Plan one step for all layers of `cache`; clears the blocks that start their life in it.

    The first `num_decodes` sequences are computed together, those of similar context length at a
    time.
    """
    write_rows = kv_write.write_rows(slot_mapping, cache.shape[4])
    kv_write.clear_new_blocks(cache, write_rows)
    parts = []
    seen = [min(length, window or length) for length in context_lens[:num_decodes]]
    for seqs in _by_length(seen):
        everyone = len(seqs) == num_decodes
        rows = slice(0, num_decodes) if everyone else torch.tensor(seqs, device=cache.device)
        contexts = [context_lens[seq] for seq in seqs]
        parts.append(_part(cache, block_table[rows], rows, 1, contexts, window, group))
    start = num_decodes
    for seq in range(num_decodes, len(query_lens)):
        length, context = query_lens[seq], context_lens[seq]
        for first, last in _pieces(length, group * min(context, length + (window or context))):
            rows, contexts = slice(start + first, start + last), [context - length + last]
            table = block_table[seq : seq + 1]
            parts.append(_part(cache, table, rows, last - first, contexts, window, group))
        start += length
    return ReferencePlan(cache, write_rows, _as_rows(cache), parts)


def paged_attention(
    query: torch.Tensor,
    plan: ReferencePlan,
    layer: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend each query to its sequence's keys; softmax in float32 or better.

    query: [tokens, heads, head_dim], any strides, heads of one KV head adjacent.
    Returns [tokens, heads * head_dim]. Reads each sequence's K and V once.
    """
    tokens, heads, head_dim = query.shape
    kv_heads = plan.cache.shape[3]
    group = heads // kv_heads
    out = query.new_empty(tokens, heads * head_dim)
    for part in plan.parts:
        gathered = plan.rows.index_select(0, part.gather + layer * 2 * kv_heads)
        shape = (2, part.count, kv_heads, -1, head_dim)
        key, value = gathered.view(shape).to(query.dtype).unbind(0)
        # The heads of a group become further queries of their one KV head.
        folded = query[part.tokens].view(part.count, part.queries, kv_heads, group, head_dim)
        folded = folded.permute(0, 2, 3, 1, 4).reshape(part.count, kv_heads, -1, head_dim)
        if softcap is None and sinks is None:
            result = F.scaled_dot_product_attention(folded, key, value, part.bias, scale=scale)
        else:
            result = _attend_plainly(folded, key, value, part.bias, scale, softcap, sinks)
        result = result.view(part.count, kv_heads, group, part.queries, head_dim)
        out[part.tokens] = result.permute(0, 3, 1, 2, 4).reshape(-1, heads * head_dim)
    return out


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with what torch's own lacks; query: [count, kv_heads, group * queries, dim]."""
    scores = (query.float() @ key.float().mT) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + bias
    if sinks is not None:
        count, kv_heads, rows, _ = scores.shape
        per_row = sinks.float().view(kv_heads, -1)
        per_row = per_row.repeat_interleave(rows // per_row.shape[1], dim=1)
        sink = per_row[None, :, :, None].expand(count, -1, -1, -1)
        scores = torch.cat((scores, sink), dim=-1)
        return (scores.softmax(dim=-1)[..., :-1] @ value.float()).to(query.dtype)
    return (scores.softmax(dim=-1) @ value.float()).to(query.dtype)


def _by_length(lengths: list[int]) -> list[list[int]]:
    """Sequences grouped so that padding to a group's longest at most doubles its keys."""
    groups: dict[int, list[int]] = {}
    for seq, length in enumerate(lengths):
        # Below 128 keys a call's fixed cost outweighs the padding.
        groups.setdefault(max(length - 1, 127).bit_length(), []).append(seq)
    return list(groups.values())


def _pieces(queries: int, elements_per_query: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of as many queries as one bias may hold."""
    step = max(1, MAX_BIAS_ELEMENTS // elements_per_query)
    for first in range(0, queries, step):
        yield first, min(first + step, queries)


def _part(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    tokens: slice | torch.Tensor,
    queries: int,
    contexts: list[int],
    window: int | None,
    group: int,
) -> _Part:
    """Plan sequences with `queries` tokens each; `block_table` has their rows alone."""
    device = cache.device
    _, _, _, kv_heads, block_size, head_dim = cache.shape
    context = torch.tensor(contexts, device=device)[:, None]
    last_block = (context - 1) // block_size
    first_block = torch.zeros_like(last_block)
    if window is not None:
        first_block = (context - queries - window + 1).clamp_(min=0) // block_size
    span = int((last_block - first_block).max()) + 1
    # Shorter sequences repeat their last block, unseen.
    columns = torch.minimum(first_block + torch.arange(span, device=device), last_block)
    blocks = block_table.gather(1, columns).long()
    row_of_block = blocks * (cache.stride(0) // (block_size * head_dim))
    row_in_block = torch.arange(2 * kv_heads, device=device).view(2, 1, kv_heads, 1)
    gather = row_of_block[None, :, None, :] + row_in_block

    key_position = first_block * block_size + torch.arange(span * block_size, device=device)
    query_position = context - queries + torch.arange(queries, device=device)
    mask = key_position[:, None, :] <= query_position[:, :, None]
    if window is not None:
        mask &= key_position[:, None, :] > query_position[:, :, None] - window
    if queries > 1:
        mask = mask.repeat(1, group, 1)
    bias = torch.zeros(mask.shape, dtype=cache.dtype, device=device).masked_fill_(~mask, -torch.inf)
    return _Part(tokens, len(contexts), queries, gather.flatten(), bias[:, None])


def _as_rows(cache: torch.Tensor) -> torch.Tensor:
    """[blocks * layers * 2 * kv_heads, block_size * head_dim] over the memory of `cache`."""
    blocks, _, _, _, block_size, head_dim = cache.shape
    row = block_size * head_dim
    assert cache[0].is_contiguous(), "a block must be one contiguous span"
    assert cache.stride(0) % row == 0, "blocks must lie whole rows apart"
    return cache.as_strided((blocks * (cache.stride(0) // row), row), (row, 1))
