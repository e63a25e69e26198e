"""Paged attention of one query per sequence, fused with all that comes between two matrix products.

A map of tasks, made on the device once a step for all layers, cuts the sequences' contexts into
runs of tiles of nearly equal length; a program takes one task and one KV head, with all its query
heads packed into one tile. The program that comes last of a sequence's programs merges what they
left, always in the order of the context, so results do not depend on who came last.

The new token needs no trip through memory: the program of a sequence's last task normalises and
rotates its K, writes it and V into the cache, and begins its sums with it.

Bytes: K and V of each context once (2 * context * kv_heads * head_dim elements), queries and
results; operations: 4 * context * heads * head_dim. Bound by memory.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from tasuki_kernels.attention_tiles import attend_tile, capped, load_tile, merge_parts, with_sink
from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.rope import QkNorm, RopeStep
from tasuki_kernels.sizes import blocks, power_of_two

TARGET_PROGRAMS = 528
"""Four programs for each of the 132 SMs of an H200: what contexts are cut for."""
MAX_PARTS = 32
"""More parts of one sequence would make merging them dearer than reading them."""
FEW = 8
"""Up to so many sequences the next kernel may start at once. With more, programs stay for longer,
and the next would get the places of those that end first: many on one SM, none on others."""
_RECORD = tl.constexpr(8)
"""int32 per task: sequence, its place among the sequence's tasks and their number, first and last
key + 1, the sequence's context length; 32 bytes, one sector."""


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The tasks of a step's decodes, and room for the parts that are merged.

    rows: count + spare; tile: keys in one.
    tasks: int32 [count + spare, 8]; arrivals: int32 [count, kv_heads], zero between layers;
    partial: float32 [count + spare, kv_heads, group, head_dim]; stats: the same with 2 at the end.
    """

    count: int
    rows: int
    tile: int
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    tasks: torch.Tensor
    arrivals: torch.Tensor
    partial: torch.Tensor
    stats: torch.Tensor
    window: int


def plan(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    context_lens: torch.Tensor,
    count: int,
    window: int | None,
    group: int,
) -> DecodePlan:
    """Map the first `count` sequences onto tasks: one small launch, no word to or from the host."""
    kv_heads, head_dim, device = cache.shape[3], cache.shape[5], cache.device
    spare = blocks(TARGET_PROGRAMS, kv_heads)
    rows, tile = count + spare, _tile(cache)
    tasks = torch.empty(rows, _RECORD.value, dtype=torch.int32, device=device)
    seqs = max(256, power_of_two(count))
    _map_kernel[(rows,)](
        context_lens, tasks, count, spare,
        WINDOW=window or 0, TILE=tile, SEQS=seqs,
        MAX_PARTS=MAX_PARTS, num_warps=2,
    )  # fmt: skip
    # By torch, which never starts early: whatever comes after it finds the map complete.
    arrivals = torch.zeros(count, kv_heads, dtype=torch.int32, device=device)
    partial = torch.empty(rows, kv_heads, group, head_dim, device=device)
    stats = torch.empty(rows, kv_heads, group, 2, device=device)
    return DecodePlan(
        count=count,
        rows=rows,
        tile=tile,
        block_table=block_table,
        slot_mapping=slot_mapping,
        tasks=tasks,
        arrivals=arrivals,
        partial=partial,
        stats=stats,
        window=window or 0,
    )


def attend(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    plan: DecodePlan,
    layer: int,
    scale: float,
    out: torch.Tensor,
    norm: QkNorm | None,
    rope: RopeStep | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """From the first `plan.count` rows of qkv to those of out, K and V into the cache on the way.

    qkv: [tokens, heads + 2 * kv_heads, head_dim], each token's row contiguous, not changed.
    out: [tokens, heads * head_dim], contiguous. A row of context length 0 becomes zero.
    """
    _, rows, head_dim = qkv.shape
    kv_heads, block_size = cache.shape[3], cache.shape[4]
    assert qkv.stride(1) == head_dim, "a token's q, k and v must lie together"
    assert cache[0].is_contiguous(), "a block must be one contiguous span"
    group = (rows - 2 * kv_heads) // kv_heads
    pdl = overlaps(qkv)
    _decode_kernel[(kv_heads, plan.rows)](
        qkv,
        norm.weight if norm else qkv,
        rope.cos if rope else qkv,
        rope.sin if rope else qkv,
        cache, plan.slot_mapping, plan.block_table, plan.tasks,
        qkv if sinks is None else sinks,
        out, plan.partial, plan.stats, plan.arrivals,
        scale, softcap or 0.0, norm.eps if norm else 0.0, layer,
        qkv.stride(0), plan.block_table.stride(0), cache.stride(0),
        GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        ROTARY=rope.cos.shape[-1] if rope else 0, WINDOW=plan.window, HAS_NORM=norm is not None,
        HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        M=max(16, power_of_two(group)), DIM=max(16, power_of_two(head_dim)),
        TILE=plan.tile, GROUP_PAD=power_of_two(group),
        SOON=plan.count <= FEW, PDL=pdl, launch_pdl=pdl,
        num_warps=2 if cache.dtype.itemsize == 2 else 4, num_stages=2,
    )  # fmt: skip


def _tile(cache: torch.Tensor) -> int:
    """Keys per tile, a power of two: up to 16 KiB of K."""
    row: int = power_of_two(cache.shape[5]) * cache.dtype.itemsize
    return max(16, min(128, 16384 // row))


@quick
@triton.jit(do_not_specialize=["count", "spare"])
def _map_kernel(
    context_lens, tasks, count, spare,
    WINDOW: tl.constexpr, TILE: tl.constexpr, SEQS: tl.constexpr, MAX_PARTS: tl.constexpr,
):  # fmt: skip
    """Program t finds task t. Each sequence has one or more, all together at most count + spare."""
    task = tl.program_id(0)
    seqs = tl.arange(0, SEQS)
    context = tl.load(context_lens + seqs, mask=seqs < count, other=0)
    cached = tl.maximum(context - 1, 0)
    first = tl.zeros_like(cached)
    if WINDOW:
        first = tl.maximum(context - WINDOW, 0) // TILE
    tiles = tl.maximum((cached + TILE - 1) // TILE - first, 0)
    longest = tl.maximum((tl.sum(tiles) + spare - 1) // spare, 1)
    parts = tl.minimum(tl.maximum((tiles + longest - 1) // longest, 1), MAX_PARTS)
    parts = tl.where(seqs < count, parts, 0)
    ends = tl.cumsum(parts, 0)
    seq = tl.sum((ends <= task).to(tl.int32))
    mine = seqs == seq
    place = task - tl.sum(tl.where(seqs < seq, parts, 0))
    number = tl.sum(tl.where(mine, parts, 0))
    own_tiles = tl.sum(tl.where(mine, tiles, 0))
    own_first = tl.sum(tl.where(mine, first, 0))
    own_context = tl.sum(tl.where(mine, context, 0))
    divisor = tl.maximum(number, 1)
    begin = (own_first + own_tiles * place // divisor) * TILE
    end = (own_first + own_tiles * (place + 1) // divisor) * TILE
    end = tl.minimum(end, tl.maximum(own_context - 1, 0))
    record = tasks + task * _RECORD
    tl.store(record, tl.where(seq < count, seq, -1))
    tl.store(record + 1, place)
    tl.store(record + 2, number)
    tl.store(record + 3, begin)
    tl.store(record + 4, end)
    tl.store(record + 5, own_context)


@triton.jit
def _with_partner(row, dims, live, ROTARY: tl.constexpr):
    """Elements `dims` of rows, and those that rope pairs them with."""
    x = tl.load(row + dims[None, :], mask=live, other=0.0)
    y = x
    if ROTARY:
        partner = tl.where(dims < ROTARY, (dims + ROTARY // 2) % ROTARY, dims)
        y = tl.load(row + partner[None, :], mask=live, other=0.0)
    return x, y


@triton.jit
def _weights(row, dims, live, HAS_NORM: tl.constexpr, ROTARY: tl.constexpr):
    if HAS_NORM:
        return _with_partner(row, dims, live, ROTARY)
    else:
        return 1.0, 1.0


@triton.jit
def _prepared(
    x, y, x_weight, y_weight, cosine, sine, eps,
    HAS_NORM: tl.constexpr, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Rows normalised and rotated, float32."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x, y = x * inverse * x_weight.to(tl.float32), y * inverse * y_weight.to(tl.float32)
    if ROTARY:
        x = x * cosine[None, :] + y * sine[None, :]
    return x


@quick
@triton.jit(do_not_specialize=["layer", "stride_table"])
def _decode_kernel(
    qkv, norm_weight, cos, sin, cache, slot_mapping, block_table, tasks, sinks,
    out, partial, stats, arrivals, scale, softcap, eps, layer,
    stride_token, stride_table, stride_block,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROTARY: tl.constexpr, WINDOW: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    GROUP_PAD: tl.constexpr, SOON: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Loads stand before the first use of any: at small batch this is a chain of latencies.

    What the plan and earlier steps wrote is read before the wait for the kernel in front: of the
    first tile, K and V themselves.
    """
    let_next_start(PDL and SOON)
    kv_head, task = tl.program_id(0), tl.program_id(1)
    record = tasks + task * _RECORD
    seq, place, number = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    begin, end, context = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    if seq < 0:
        return
    rows, dims = tl.arange(0, M), tl.arange(0, DIM)
    live = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    in_head = (dims < HEAD_DIM)[None, :]
    q_at = (kv_head * GROUP + rows)[:, None] * HEAD_DIM
    k_at = (GROUP * KV_HEADS + kv_head + tl.arange(0, 1))[:, None] * HEAD_DIM
    table_row = block_table + seq.to(tl.int64) * stride_table

    slot = tl.load(slot_mapping + seq).to(tl.int64)
    qx_weight, qy_weight = _weights(norm_weight + q_at, dims, live, HAS_NORM, ROTARY)
    kx_weight, ky_weight = _weights(norm_weight + k_at, dims, in_head, HAS_NORM, ROTARY)
    cosine, sine = 1.0, 0.0
    if ROTARY:
        turn = tl.maximum(context - 1, 0).to(tl.int64) * ROTARY + dims
        cosine = tl.load(cos + turn, mask=dims < ROTARY, other=1.0)
        sine = tl.load(sin + turn, mask=dims < ROTARY, other=0.0)
    keys = begin + tl.arange(0, TILE)
    seen = _seen(keys, end, context, WINDOW)
    key, value = load_tile(
        cache, table_row, keys, seen, dims, layer, kv_head, stride_block,
        KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM, True,
    )  # fmt: skip
    wait_for_previous(PDL)
    if context == 0:
        at = seq.to(tl.int64) * KV_HEADS * GROUP * HEAD_DIM + q_at + dims[None, :]
        tl.store(out + at, tl.zeros([M, DIM], out.dtype.element_ty), mask=live)
        return

    token = qkv + seq.to(tl.int64) * stride_token
    qx, qy = _with_partner(token + q_at, dims, live, ROTARY)
    kx, ky = _with_partner(token + k_at, dims, in_head, ROTARY)
    new_value = tl.load(token + k_at + KV_HEADS * HEAD_DIM + dims[None, :], mask=in_head, other=0.0)
    element = cache.dtype.element_ty
    query = _prepared(
        qx, qy, qx_weight, qy_weight, cosine, sine, eps, HAS_NORM, ROTARY, HEAD_DIM
    ).to(element)  # fmt: skip

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    if place == number - 1:
        new_key = _prepared(
            kx, ky, kx_weight, ky_weight, cosine, sine, eps, HAS_NORM, ROTARY, HEAD_DIM
        ).to(element)  # fmt: skip
        row = (layer * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        target = cache + slot // BLOCK_SIZE * stride_block + row * HEAD_DIM + dims[None, :]
        tl.store(target, new_key, mask=in_head)
        tl.store(target + KV_HEADS * BLOCK_SIZE * HEAD_DIM, new_value.to(element), mask=in_head)
        products = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1)
        products, factor = capped(products, scale, softcap, HAS_SOFTCAP)
        top = products * factor
        total += 1.0
        acc += new_value.to(element).to(tl.float32)

    top, total, acc = attend_tile(
        query, key.T, value, seen[None, :], top, total, acc, scale, softcap, HAS_SOFTCAP, True
    )
    for start in range(begin + TILE, end, TILE):
        keys = start + tl.arange(0, TILE)
        seen = _seen(keys, end, context, WINDOW)
        key, value = load_tile(
            cache, table_row, keys, seen, dims, layer, kv_head, stride_block,
            KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM, True,
        )  # fmt: skip
        top, total, acc = attend_tile(
            query, key.T, value, seen[None, :], top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )

    let_next_start(PDL)
    if number == 1:
        _finish(
            top, total, acc, out, sinks, seq, kv_head, rows, dims,
            GROUP, KV_HEADS, HEAD_DIM, HAS_SINKS,
        )  # fmt: skip
    else:
        part = (task * KV_HEADS + kv_head) * GROUP + rows
        at = part.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partial + at, acc, mask=live)
        tl.store(stats + part * 2, top, mask=rows < GROUP)
        tl.store(stats + part * 2 + 1, total, mask=rows < GROUP)
        # All threads' parts must lie in memory before the one that counts says so.
        tl.debug_barrier()
        arrival = arrivals + seq * KV_HEADS + kv_head
        if tl.atomic_add(arrival, 1, sem="acq_rel") == number - 1:
            tl.store(arrival, 0)
            heads = tl.arange(0, GROUP_PAD)
            first = ((task - place) * KV_HEADS + kv_head) * GROUP + heads
            all_top, all_total, all_acc = merge_parts(
                partial, stats, first, KV_HEADS * GROUP, number, heads < GROUP, dims,
                HEAD_DIM, GROUP_PAD, DIM,
            )  # fmt: skip
            _finish(
                all_top, all_total, all_acc, out, sinks, seq, kv_head, heads, dims,
                GROUP, KV_HEADS, HEAD_DIM, HAS_SINKS,
            )  # fmt: skip


@triton.jit
def _seen(keys, end, context, WINDOW: tl.constexpr):
    seen = keys < end
    if WINDOW:
        seen = seen & (keys >= context - WINDOW)
    return seen


@triton.jit
def _finish(
    top, total, acc, out, sinks, seq, kv_head, rows, dims,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    head = kv_head * GROUP + rows
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=rows < GROUP, other=0.0).to(tl.float32)
        top, total, acc = with_sink(top, total, acc, sink)
    at = (seq.to(tl.int64) * KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + dims[None, :]
    live = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    total = tl.where(rows < GROUP, total, 1.0)
    tl.store(out + at, acc / total[:, None], mask=live)
