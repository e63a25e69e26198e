"""Attention of ragged chunks of queries over the paged cache.

The host knows the lengths of chunks, so it cuts them into tasks: some queries with all query heads
of a KV head packed into one tile, over a run of keys. Where there would be too few programs to
fill the device, as for a short rest of a long prompt, the runs are cut, and a second kernel merges
the parts. The head of a prompt that has nothing before it, in half precision and without window,
softcap or sinks, goes to cuDNN straight from the qkv buffer, which is faster by half.

Bytes: K and V of the context once per task, from L2 mostly; operations: 4 * head_dim * heads for
each pair of a query and a key that it sees. Bound by operations for long chunks.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from tasuki_kernels.attention_tiles import attend_tile, load_tile, merge_parts, with_sink
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks, power_of_two

TARGET_PROGRAMS = 264
"""Two programs for each of the 132 SMs of an H200 run at once; cutting makes no more than that."""
MIN_KEYS = 128
"""A part of fewer keys costs more to merge than it saves."""
MERGE_KEYS = 210
PART_KEYS = 2.7
"""What the merging kernel costs, and each part's way through memory; in keys, see `_parts`."""
DENSE_UNIT = 1024
"""cuDNN builds a plan for each length it meets; it meets multiples of this alone."""
_RECORD = tl.constexpr(8)
_MERGED_ROWS = 4


class Chunk(NamedTuple):
    """One sequence's part of a step: `queries` tokens from row `row`, the last of `context`."""

    seq: int
    row: int
    queries: int
    context: int


class Dense(NamedTuple):
    """`prompts` heads of prompts of `length` tokens each, one behind the other from row `row`."""

    row: int
    length: int
    prompts: int

    @property
    def end(self) -> int:
        """The row behind the last."""
        return self.row + self.length * self.prompts


class Tile(NamedTuple):
    """Rows (queries times heads of a group) and keys per tile, and how the kernel is launched."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """At most so many for a thread, so that an SM holds two programs; None: as many as it likes."""


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """The tasks of a step's chunks, longest first, and room for the parts that are merged.

    dense: what cuDNN takes. tasks, merges: int32 [n, 8].
    partial: float32 [parts, kv_heads, rows per tile, head_dim]; stats: the same with 2 at the end.
    """

    dense: list[Dense]
    num_tasks: int
    num_merges: int
    tasks: torch.Tensor
    merges: torch.Tensor
    partial: torch.Tensor
    stats: torch.Tensor
    block_table: torch.Tensor
    window: int
    tile: Tile

    def is_one_dense(self, tokens: int) -> bool:
        """Whether cuDNN takes all of the step's `tokens` at once: no copy into place."""
        first = self.dense[0] if self.dense else None
        return first is not None and (first.row, first.end) == (0, tokens)


def plan(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    chunks: list[Chunk],
    window: int | None,
    group: int,
    plain: bool,
) -> PrefillPlan:
    """Cut the chunks into tasks, on the host; one copy to the device, which nobody waits for.

    plain: neither softcap nor sinks will be asked for.
    """
    kv_heads, head_dim, device = cache.shape[3], cache.shape[5], cache.device
    can_go = plain and window is None and can_be_dense(cache)
    dense, rest = _without_dense(chunks) if can_go else ([], chunks)
    tile = _tile(cache.dtype, head_dim, group, max((chunk.queries for chunk in rest), default=0))
    tasks, merges = _cut(rest, tile, kv_heads, window, tile.rows // group)
    parts = sum(merge[3] for merge in merges)
    numbers = np.zeros((len(tasks) + len(merges), _RECORD.value), np.int32)
    numbers[: len(tasks), :7] = np.array(tasks, np.int32).reshape(-1, 7)
    numbers[len(tasks) :, :4] = np.array(merges, np.int32).reshape(-1, 4)
    records = torch.from_numpy(numbers)
    if device.type == "cuda":
        records = records.pin_memory().to(device, non_blocking=True)
    return PrefillPlan(
        dense=dense,
        num_tasks=len(tasks),
        num_merges=len(merges),
        tasks=records[: len(tasks)],
        merges=records[len(tasks) :],
        partial=torch.empty(parts, kv_heads, tile.rows, head_dim, device=device),
        stats=torch.empty(parts, kv_heads, tile.rows, 2, device=device),
        block_table=block_table,
        window=window or 0,
        tile=tile,
    )


def attend(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    plan: PrefillPlan,
    layer: int,
    scale: float,
    out: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Attend the planned chunks' queries, prepared already; their K and V are in the cache.

    qkv: [tokens, heads + 2 * kv_heads, head_dim]; out: [tokens, heads * head_dim], contiguous.
    """
    assert not plan.dense or (softcap is None and sinks is None), "planned as plain"
    for dense in plan.dense:
        rows = slice(dense.row, dense.end)
        out[rows] = attend_dense(qkv[rows], cache.shape[3], scale, dense.prompts)
    if not plan.num_tasks:
        return
    _, rows_of_token, head_dim = qkv.shape
    kv_heads, tile = cache.shape[3], plan.tile
    group = (rows_of_token - 2 * kv_heads) // kv_heads
    dim = max(16, power_of_two(head_dim))
    sinks_or_any = qkv if sinks is None else sinks
    _prefill_kernel[(kv_heads, plan.num_tasks)](
        qkv, cache, plan.block_table, plan.tasks, sinks_or_any, out, plan.partial, plan.stats,
        scale, softcap or 0.0, layer,
        qkv.stride(0), plan.block_table.stride(0), cache.stride(0),
        GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=cache.shape[4],
        WINDOW=plan.window, HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        M=tile.rows, DIM=dim, TILE=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
    )  # fmt: skip
    if plan.num_merges:
        _merge_kernel[(plan.num_merges, kv_heads, blocks(tile.rows, _MERGED_ROWS))](
            plan.partial, plan.stats, plan.merges, sinks_or_any, out,
            GROUP=group, KV_HEADS=kv_heads, HEAD_DIM=head_dim, HAS_SINKS=sinks is not None,
            M=tile.rows, DIM=dim, ROWS=_MERGED_ROWS, num_warps=4,
        )  # fmt: skip


def attend_dense(qkv: torch.Tensor, kv_heads: int, scale: float, prompts: int) -> torch.Tensor:
    """Causal attention within each of equally long prompts, by cuDNN: [tokens, heads * head_dim].

    qkv: [tokens, heads + 2 * kv_heads, head_dim], the prompts one behind the other.
    """
    tokens, rows, head_dim = qkv.shape
    heads = rows - 2 * kv_heads
    by_head = qkv.view(prompts, tokens // prompts, rows, head_dim).transpose(1, 2)
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        by_head[:, :heads],
        by_head[:, heads : heads + kv_heads],
        by_head[:, heads + kv_heads :],
        None, False, 0.0, True, False, scale=scale,
    )[0]  # fmt: skip
    return result.transpose(1, 2).reshape(tokens, heads * head_dim)


def can_be_dense(cache: torch.Tensor) -> bool:
    """Whether cuDNN has a fast kernel for this dtype and head dimension."""
    half = cache.dtype in (torch.bfloat16, torch.float16)
    return cache.is_cuda and half and cache.shape[5] in (64, 128)


def _without_dense(chunks: list[Chunk]) -> tuple[list[Dense], list[Chunk]]:
    """Heads of prompts, whole units long, and what remains of all chunks."""
    dense: list[Dense] = []
    rest = []
    for chunk in chunks:
        length = chunk.queries // DENSE_UNIT * DENSE_UNIT if chunk.queries == chunk.context else 0
        if length:
            last = dense[-1] if dense else Dense(-1, 0, 0)
            if last.end == chunk.row and last.length == length:
                dense[-1] = last._replace(prompts=last.prompts + 1)
            else:
                dense.append(Dense(chunk.row, length, 1))
        if length < chunk.queries:
            left = chunk.queries - length
            rest.append(chunk._replace(row=chunk.row + length, queries=left))
    return dense, rest


def _cut(
    chunks: list[Chunk], tile: Tile, kv_heads: int, window: int | None, queries: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Tasks, longest first: (seq, row, queries, position, first key, last key + 1, part or -1).

    And for those cut: (row, queries, first part, parts). `queries` is how many a tile holds.
    """
    whole = []
    for chunk in chunks:
        for first in range(0, chunk.queries, queries):
            count = min(queries, chunk.queries - first)
            position = chunk.context - chunk.queries + first
            begin = max(0, position - window + 1) // tile.keys * tile.keys if window else 0
            whole.append((chunk.seq, chunk.row + first, count, position, begin, position + count))
    number_of_parts = _parts([end - begin for *_, begin, end in whole], kv_heads)
    tasks: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    next_part = 0
    for (seq, row, count, position, begin, end), parts in zip(whole, number_of_parts, strict=True):
        tiles = -(-(end - begin) // tile.keys)
        cuts = [begin + tiles * part // parts * tile.keys for part in range(parts)] + [end]
        for part in range(parts):
            place = next_part + part if parts > 1 else -1
            tasks.append((seq, row, count, position, cuts[part], cuts[part + 1], place))
        if parts > 1:
            merges.append((row, count, next_part, parts))
            next_part += parts
    tasks.sort(key=lambda task: task[4] - task[5])
    return tasks, merges


def _parts(runs: list[int], kv_heads: int) -> list[int]:
    """Into how many parts to cut runs of so many keys: one each where cutting does not pay.

    Times are counted in keys that one program takes meanwhile, about 50 in a microsecond.
    """
    work = max(1, sum(runs) * kv_heads)
    parts = [max(1, min(run * TARGET_PROGRAMS // work, run // MIN_KEYS)) for run in runs]
    # Two programs on an SM take turns: each is half as fast, and a little less.
    even = 2.3 * work / TARGET_PROGRAMS
    cut = max(even, MIN_KEYS) + MERGE_KEYS + PART_KEYS * kv_heads * sum(parts)
    return parts if cut < max(runs, default=0) else [1] * len(runs)


def _tile(dtype: torch.dtype, head_dim: int, group: int, longest: int) -> Tile:
    """For chunks of at most `longest` queries."""
    if dtype.itemsize > 2:
        return Tile(rows=max(16, power_of_two(group)), keys=32, warps=4, stages=1)
    rows = max(128 if longest * group > 64 else 64, power_of_two(group))
    if head_dim > 128:
        return Tile(rows, keys=64, warps=8, stages=2)
    if head_dim > 64 and rows == 128:
        return Tile(rows, keys=64, warps=8, stages=3, registers=128)
    return Tile(rows, keys=64, warps=4, stages=3)


@quick
@triton.jit(do_not_specialize=["layer", "stride_table"])
def _prefill_kernel(
    qkv, cache, block_table, tasks, sinks, out, partial, stats, scale, softcap, layer,
    stride_token, stride_table, stride_block,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    M: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    kv_head, record = tl.program_id(0), tasks + tl.program_id(1) * _RECORD
    seq, first_row, count = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    first_position, begin, end = tl.load(record + 3), tl.load(record + 4), tl.load(record + 5)
    part = tl.load(record + 6)
    rows, dims = tl.arange(0, M), tl.arange(0, DIM)
    live = (rows < count * GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    token = (first_row + rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    at = (token * stride_token + head * HEAD_DIM)[:, None] + dims[None, :]
    query = tl.load(qkv + at, mask=live, other=0.0).to(cache.dtype.element_ty)
    positions = first_position + rows // GROUP

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    table_row = block_table + seq.to(tl.int64) * stride_table
    # Every query sees every key up to the first query's own position; a window masks everywhere.
    plain_end = begin
    if WINDOW == 0:
        plain_keys = tl.maximum(tl.minimum(first_position + 1, end) - begin, 0)
        plain_end = begin + plain_keys // TILE * TILE
    for start in range(begin, plain_end, TILE):
        keys = start + tl.arange(0, TILE)
        key, value = load_tile(
            cache, table_row, keys, keys >= 0, dims, layer, kv_head, stride_block,
            KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM, False,
        )  # fmt: skip
        top, total, acc = attend_tile(
            query, key.T, value, True, top, total, acc, scale, softcap, HAS_SOFTCAP, False
        )
    for start in range(plain_end, end, TILE):
        keys = start + tl.arange(0, TILE)
        seen = keys < end
        if WINDOW:
            seen = seen & (keys > first_position - WINDOW)
        key, value = load_tile(
            cache, table_row, keys, seen, dims, layer, kv_head, stride_block,
            KV_HEADS, BLOCK_SIZE, HEAD_DIM, DIM, True,
        )  # fmt: skip
        visible = keys[None, :] <= positions[:, None]
        if WINDOW:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        top, total, acc = attend_tile(
            query, key.T, value, visible, top, total, acc, scale, softcap, HAS_SOFTCAP, True
        )

    if part >= 0:
        place = (part * KV_HEADS + kv_head).to(tl.int64) * M + rows
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=live)
        tl.store(stats + place * 2, top, mask=rows < count * GROUP)
        tl.store(stats + place * 2 + 1, total, mask=rows < count * GROUP)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head).to(tl.float32)
            top, total, acc = with_sink(top, total, acc, sink)
        total = tl.where(rows < count * GROUP, total, 1.0)
        at = (token * KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out + at, acc / total[:, None], mask=live)


@quick
@triton.jit
def _merge_kernel(
    partial, stats, merges, sinks, out,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
    M: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of ROWS rows of one tile, in the order of their keys."""
    record, kv_head = merges + tl.program_id(0) * _RECORD, tl.program_id(1)
    first_row, count = tl.load(record), tl.load(record + 1)
    first_part, parts = tl.load(record + 2), tl.load(record + 3)
    rows, dims = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    there = rows < count * GROUP
    live = there[:, None] & (dims < HEAD_DIM)[None, :]
    first = (first_part * KV_HEADS + kv_head) * M + rows
    top, total, acc = merge_parts(
        partial, stats, first, KV_HEADS * M, parts, there, dims, HEAD_DIM, ROWS, DIM
    )
    head = kv_head * GROUP + rows % GROUP
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top, total, acc = with_sink(top, total, acc, sink)
    token = (first_row + rows // GROUP).to(tl.int64)
    total = tl.where(there, total, 1.0)
    at = (token * KV_HEADS * GROUP + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + at, acc / total[:, None], mask=live)
