"""What comes between the qkv product and attention over a chunk: norm of q and k, rope, KV write.

One launch for a layer. Bytes: reads qkv, writes q and k back where they changed, and K and V into
the cache: about 2 * tokens * (heads + 3 * kv_heads) * head_dim elements. Bound by memory.
Decoding has the same inside its attention kernel.
"""

import torch
import triton
import triton.language as tl

from tasuki_kernels.launcher import quick
from tasuki_kernels.rope import QkNorm, RopeStep
from tasuki_kernels.sizes import blocks, power_of_two

_TOKENS = 64


def prepare(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    layer: int,
    norm: QkNorm | None,
    rope: RopeStep | None,
    first: int,
) -> None:
    """Normalise and rotate q and k in place, for the tokens from row `first`; write their K and V.

    qkv: [tokens, heads + 2 * kv_heads, head_dim], each token's row contiguous.
    cache: [blocks, layers, 2, kv_heads, block_size, head_dim]; slot_mapping: [tokens] int64.
    """
    tokens, rows, head_dim = qkv.shape
    kv_heads, block_size = cache.shape[3], cache.shape[4]
    assert qkv.stride(1) == head_dim, "a token's q, k and v must lie together"
    changes = norm is not None or rope is not None
    rotary = rope.cos.shape[-1] if rope else head_dim
    rest = head_dim - rotary
    first_row = 0 if changes else rows - 2 * kv_heads
    _prepare_kernel[(blocks(tokens - first, _TOKENS), rows - first_row)](
        qkv,
        norm.weight if norm else qkv,
        rope.cos if rope else qkv,
        rope.sin if rope else qkv,
        rope.positions if rope else slot_mapping,
        cache,
        slot_mapping,
        norm.eps if norm else 0.0,
        first,
        tokens,
        first_row,
        layer,
        qkv.stride(0),
        cache.stride(0),
        ROWS=rows,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HALF=rotary // 2,
        HALF_PAD=power_of_two(rotary // 2),
        REST=rest,
        REST_PAD=power_of_two(max(rest, 1)),
        HAS_NORM=norm is not None,
        HAS_ROPE=rope is not None,
        TOKENS=_TOKENS,
        num_warps=4,
    )


@quick
@triton.jit(do_not_specialize=["first", "tokens", "first_row", "layer"])
def _prepare_kernel(
    qkv, norm_weight, cos, sin, positions, cache, slot_mapping, eps, first, tokens, first_row,
    layer, stride_token, stride_block,
    ROWS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, REST: tl.constexpr, REST_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One row (a head of q, k or v) of TOKENS tokens, in two halves and what is not rotated.

    A thread holds both dimensions of a pair, so that writing in place meets no reader.
    """
    token = first + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = first_row + tl.program_id(1)
    there = token < tokens
    half, rest = tl.arange(0, HALF_PAD), tl.arange(0, REST_PAD)
    in_half = there[:, None] & (half < HALF)[None, :]
    in_rest = there[:, None] & (rest < REST)[None, :]
    at = qkv + token.to(tl.int64)[:, None] * stride_token + row * HEAD_DIM
    low_at, high_at = at + half[None, :], at + (HALF + half)[None, :]
    low, high = tl.load(low_at, mask=in_half, other=0.0), tl.load(high_at, mask=in_half, other=0.0)
    if REST:
        rest_at = at + (2 * HALF + rest)[None, :]
        tail = tl.load(rest_at, mask=in_rest, other=0.0)

    if row < ROWS - KV_HEADS and (HAS_NORM or HAS_ROPE):
        a, b = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
            if REST:
                c = tail.to(tl.float32)
                squares += tl.sum(c * c, axis=1)
            inverse = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            weight = norm_weight + row * HEAD_DIM
            a *= inverse * _weights(weight, half, HALF)
            b *= inverse * _weights(weight + HALF, half, HALF)
            if REST:
                c *= inverse * _weights(weight + 2 * HALF, rest, REST)
                tail = c.to(tail.dtype)
                tl.store(rest_at, tail, mask=in_rest)
        if HAS_ROPE:
            position = tl.load(positions + token, mask=there, other=0).to(tl.int64)
            turn = position[:, None] * (2 * HALF) + HALF + half[None, :]
            cosine = tl.load(cos + turn, mask=in_half, other=1.0)
            sine = tl.load(sin + turn, mask=in_half, other=0.0)
            a, b = a * cosine - b * sine, b * cosine + a * sine
        low, high = a.to(low.dtype), b.to(high.dtype)
        tl.store(low_at, low, mask=in_half)
        tl.store(high_at, high, mask=in_half)

    kv_row = row - (ROWS - 2 * KV_HEADS)
    if kv_row >= 0:
        slot = tl.load(slot_mapping + token, mask=there, other=0).to(tl.int64)
        line = (layer * 2 * KV_HEADS + kv_row) * BLOCK_SIZE + slot % BLOCK_SIZE
        target = cache + (slot // BLOCK_SIZE * stride_block + line * HEAD_DIM)[:, None]
        element = cache.dtype.element_ty
        tl.store(target + half[None, :], low.to(element), mask=in_half)
        tl.store(target + (HALF + half)[None, :], high.to(element), mask=in_half)
        if REST:
            tl.store(target + (2 * HALF + rest)[None, :], tail.to(element), mask=in_rest)


@triton.jit
def _weights(weight, dims, SIZE: tl.constexpr):
    return tl.load(weight + dims, mask=dims < SIZE, other=0.0).to(tl.float32)[None, :]
