"""What the Triton attention kernels share: one tile of keys, the sink, and the score's transforms.

Scores are kept in units of log2, so that exponentials are `exp2` (Dao 2023, FlashAttention-2).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(q·k, factor): their product is the score in units of log2.

    With a softcap the score is squeezed into (-softcap, softcap) before.
    """
    if HAS_SOFTCAP:
        # tanh by exp2, stable at both ends.
        squeezed = 1.0 - 2.0 / (tl.exp2(products * (2.0 * LOG2_E * scale / softcap)) + 1.0)
        return softcap * squeezed, LOG2_E
    else:
        return products, scale * LOG2_E


@triton.jit
def load_tile(
    cache, table_row, keys, seen, dims, layer, kv_head, stride_block,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """K and V at positions `keys`, [keys, dims] each; rows that are not `seen` are zero.

    cache: [blocks, layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM], blocks `stride_block` apart.
    """
    blocks = tl.load(table_row + keys // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    row = (layer * 2 * KV_HEADS + kv_head) * BLOCK_SIZE + keys % BLOCK_SIZE
    at = cache + blocks * stride_block + row.to(tl.int64) * HEAD_DIM
    key_at = at[:, None] + dims[None, :]
    value_at = key_at + KV_HEADS * BLOCK_SIZE * HEAD_DIM
    if MASKED or DIM != HEAD_DIM:
        there = seen[:, None] & (dims < HEAD_DIM)[None, :]
        return tl.load(key_at, mask=there, other=0.0), tl.load(value_at, mask=there, other=0.0)
    else:
        return tl.load(key_at), tl.load(value_at)


@triton.jit
def attend_tile(
    query, key, value, visible, top, total, acc, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: query [m, d], key [d, n], value [n, d], visible [m, n].

    top [m]: the greatest score so far; total [m]: sum of exp2(score - top); acc [m, d]: the same
    sum over values; scale is positive. A row that has seen nothing has top = -inf, total = 0.
    """
    products = tl.dot(query, key, input_precision="ieee")
    products, factor = capped(products, scale, softcap, HAS_SOFTCAP)
    if MASKED:
        products = tl.where(visible, products, float("-inf"))
    new_top = tl.maximum(top, tl.max(products, axis=1) * factor)
    base = new_top
    if MASKED:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf less -inf would be NaN
    weights = tl.exp2(products * factor - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def with_sink(top, total, acc, sink):
    """The sink is one more key of score `sink` (natural units) whose value is zero."""
    new_top = tl.maximum(top, sink * LOG2_E)
    decay = tl.exp2(top - new_top)
    return new_top, total * decay + tl.exp2(sink * LOG2_E - new_top), acc * decay[:, None]


@triton.jit
def merge_parts(
    partial, stats, first, step, number, there, dims,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """top, total and acc of ROWS rows over all their parts, in the order of the parts.

    Row r of part i is row first[r] + i * step of partial [.., HEAD_DIM] and stats [.., 2]. Several
    parts at a time are in flight, so that their latency is paid once; they are read past caches
    that could be stale, for another program of the same kernel may have just written them.
    """
    AT_ONCE: tl.constexpr = max(1, 8192 // (ROWS * DIM))
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for index in range(0, number, AT_ONCE):
        parts = index + tl.arange(0, AT_ONCE)
        live = (parts < number)[:, None] & there[None, :]
        rows = first.to(tl.int64)[None, :] + (parts * step)[:, None]
        tops = tl.load(stats + rows * 2, mask=live, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stats + rows * 2 + 1, mask=live, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial + rows[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=live[:, :, None] & (dims < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(tops - base[None, :])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(totals * weights, axis=0)
        acc = acc * decay[:, None] + tl.sum(values * weights[:, :, None], axis=0)
        top = new_top
    return top, total, acc
