"""The chunked scan of `ssd.py` in Triton, over ragged sequences, with checkpoints in the same pass.

A sequence is cut into segments, a segment into chunks. One program scans the chunks of a segment
for one head and keeps the state in registers: states between chunks cost no memory traffic. Where
a sequence has several segments, two kernels go before: the first sums what each segment adds to
the state and by how much it decays, the second passes states from segment to segment.
"""

import functools

import torch
import triton
import triton.language as tl

from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks, power_of_two
from tasuki_kernels.ssd import Mixer
from tasuki_kernels.ssd_plan import CHUNK, PrefillPlan
from tasuki_kernels.ssd_prepare import part_rows, rows_at_once

_PASS_BLOCK = 1024


def chunk_scan(
    mixed: torch.Tensor,
    times: torch.Tensor,
    ssm_states: torch.Tensor,
    mixer: Mixer,
    plan: PrefillPlan,
    out: torch.Tensor,
) -> None:
    """Writes y to `out`, the sequences' last states to their slots, and the checkpoints to theirs.

    mixed: [tokens, conv_dim]: x, B, C after the convolution, and times: [2, heads, tokens], both of
    `ssd_prepare.py`; ssm_states: [slots, heads, head_dim, state_size], float32 or bfloat16, any
    slot stride; out: [tokens, heads * head_dim], contiguous, mixed's dtype.

    Products take mixed's dtype (float32: exact products) and accumulate in float32; states are
    float32 between chunks and segments. Per token and head 2 * (CHUNK * (head_dim + state_size) +
    2 * head_dim * state_size) operations, and the half of it again for the sums of segments; reads
    mixed per head out of L2, writes out once.
    """
    tokens = mixed.shape[0]
    heads, head_dim, size = ssm_states.shape[1:]
    shape = _launch_shape(heads, head_dim, size, mixer.groups, mixed.dtype)
    carried = mixed.new_empty((plan.num_carried, heads, head_dim, size), dtype=torch.float32)
    if plan.num_carried:
        decays = mixed.new_empty((plan.num_carried, heads), dtype=torch.float32)
        _sum_segments_kernel[(heads, plan.summed.shape[0])](
            mixed,
            times,
            carried,
            decays,
            plan.summed,
            plan.segments,
            plan.bounds,
            tokens,
            **shape,
        )
        elements = heads * head_dim * size
        _pass_states_kernel[(blocks(elements, _PASS_BLOCK), plan.carried.shape[0])](
            carried,
            decays,
            ssm_states,
            plan.slots,
            plan.context_lens,
            plan.lens,
            plan.carried,
            ssm_states.stride(0),
            HEADS=heads,
            HEAD_ELEMENTS=head_dim * size,
            BLOCK=_PASS_BLOCK,
        )
    _scan_segments_kernel[(heads, plan.segments.shape[0])](
        mixed,
        times,
        mixer.D,
        carried,
        ssm_states,
        plan.slots,
        plan.context_lens,
        plan.lens,
        plan.segments,
        plan.bounds,
        plan.exports,
        out,
        tokens,
        ssm_states.stride(0),
        **shape,
    )


@functools.cache
def _launch_shape(
    heads: int, head_dim: int, size: int, groups: int, dtype: torch.dtype
) -> dict[str, int | str]:
    exact = dtype == torch.float32
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "SIZE": size,
        "GROUPS": groups,
        "BLOCK_P": max(power_of_two(head_dim), 16),
        "BLOCK_N": max(power_of_two(size), 16),
        "CHUNK": CHUNK,
        "ROWS": rows_at_once(dtype),
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8 if exact else 4,
        "num_stages": 1 if exact else 2,
    }


@triton.jit
def _part_inputs(
    mixed,
    times,
    first,
    end,
    head,
    tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x [rows, head_dim], B [rows, size], dt, the decay's logarithm at each row and at the end."""
    INNER: tl.constexpr = HEADS * HEAD_DIM
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * SIZE
    q, p, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    valid = q < end - first
    rows = mixed + first.to(tl.int64) * CHANNELS + q[:, None] * CHANNELS
    b = INNER + head // (HEADS // GROUPS) * SIZE + n
    in_p, in_n = valid[:, None] & (p < HEAD_DIM)[None, :], valid[:, None] & (n < SIZE)[None, :]
    x = tl.load(rows + head * HEAD_DIM + p[None, :], mask=in_p, other=0.0)
    B = tl.load(rows + b[None, :], mask=in_n, other=0.0)
    at = times + head.to(tl.int64) * tokens + first
    step = tl.load(at + q, mask=valid, other=0.0)
    at += HEADS * tokens.to(tl.int64)
    decay = tl.load(at + q, mask=valid, other=0.0)
    total = tl.load(at + end - first - 1, mask=end > first, other=0.0)
    return x, B, step, decay, total


@triton.jit
def _next_state(state, x, B, step, decay, total, PRECISION: tl.constexpr):
    """The state [head_dim, size] after some rows."""
    weighted = x.to(tl.float32) * (step * tl.exp2(total - decay))[:, None]
    state = state * tl.exp2(total)
    return tl.dot(tl.trans(weighted.to(x.dtype)), B, acc=state, input_precision=PRECISION)


@quick
@triton.jit(do_not_specialize=["tokens"])
def _sum_segments_kernel(
    mixed,
    times,
    carried,
    decays,
    summed,
    segments,
    bounds,
    tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a segment adds to the state, at the place of the segment after it; and its decay."""
    head = tl.program_id(0)
    segment = segments + tl.load(summed + tl.program_id(1)) * 5
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    decayed = 0.0
    PARTS: tl.constexpr = CHUNK // ROWS
    for part in range(tl.load(segment) * PARTS, tl.load(segment + 1) * PARTS):
        first, end = part_rows(bounds, part, PARTS, ROWS)
        x, B, step, decay, total = _part_inputs(
            mixed, times, first, end, head, tokens,
            HEADS, HEAD_DIM, SIZE, GROUPS, BLOCK_P, BLOCK_N, ROWS,
        )  # fmt: skip
        state = _next_state(state, x, B, step, decay, total, PRECISION)
        decayed += total
    place = (tl.load(segment + 3) + 1).to(tl.int64) * HEADS + head
    tl.store(decays + place, tl.exp2(decayed))
    p, n = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    target = carried + place * (HEAD_DIM * SIZE) + p * SIZE + n
    tl.store(target, state, mask=(p < HEAD_DIM) & (n < SIZE))


@quick
@triton.jit(do_not_specialize_on_alignment=["slots", "context_lens"])
def _pass_states_kernel(
    carried,
    decays,
    ssm_states,
    slots,
    context_lens,
    lens,
    sequences,
    ssm_stride,
    HEADS: tl.constexpr,
    HEAD_ELEMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns the segments' sums into the states before them, from the slot's state onward."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < HEADS * HEAD_ELEMENTS
    sequence = sequences + tl.program_id(1) * 3
    place, seq = tl.load(sequence).to(tl.int64), tl.load(sequence + 2)
    slot = tl.load(slots + seq).to(tl.int64)
    held = tl.where(tl.load(context_lens + seq) > tl.load(lens + seq), HEADS * HEAD_ELEMENTS, 0)
    state = tl.load(ssm_states + slot * ssm_stride + offsets, mask=offsets < held, other=0.0)
    state = state.to(tl.float32)
    place *= HEADS * HEAD_ELEMENTS
    tl.store(carried + place + offsets, state, mask=inside)
    decay_at = decays + tl.load(sequence).to(tl.int64) * HEADS + offsets // HEAD_ELEMENTS
    for _ in range(1, tl.load(sequence + 1)):
        place += HEADS * HEAD_ELEMENTS
        decay_at += HEADS
        added = tl.load(carried + place + offsets, mask=inside, other=0.0)
        state = state * tl.load(decay_at, mask=inside, other=0.0) + added
        tl.store(carried + place + offsets, state, mask=inside)


@quick
@triton.jit(
    do_not_specialize=["tokens"],
    do_not_specialize_on_alignment=["slots", "context_lens"],
)
def _scan_segments_kernel(
    mixed,
    times,
    D,
    carried,
    ssm_states,
    slots,
    context_lens,
    lens,
    segments,
    bounds,
    exports,
    out,
    tokens,
    ssm_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of one segment and head; the state after it goes to the slot where it is the last."""
    INNER: tl.constexpr = HEADS * HEAD_DIM
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * SIZE
    head, segment = tl.program_id(0), segments + tl.program_id(1) * 5
    seq, place = tl.load(segment + 2), tl.load(segment + 3).to(tl.int64)
    q, p, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p < HEAD_DIM)[:, None] & (n < SIZE)[None, :]
    elements = head * (HEAD_DIM * SIZE) + p[:, None] * SIZE + n[None, :]
    running = ssm_states + tl.load(slots + seq).to(tl.int64) * ssm_stride + elements
    if place < 0:
        held = tl.where(tl.load(context_lens + seq) > tl.load(lens + seq), SIZE, 0)
        stored = tl.load(running, mask=inside & (n < held)[None, :], other=0.0)
        state = stored.to(tl.float32)
    else:
        state = tl.load(carried + place * (INNER * SIZE) + elements, mask=inside, other=0.0)
    skip = tl.load(D + head)
    c = INNER + (GROUPS + head // (HEADS // GROUPS)) * SIZE + n
    PARTS: tl.constexpr = CHUNK // ROWS
    for part in range(tl.load(segment) * PARTS, tl.load(segment + 1) * PARTS):
        first, end = part_rows(bounds, part, PARTS, ROWS)
        x, B, step, decay, total = _part_inputs(
            mixed, times, first, end, head, tokens,
            HEADS, HEAD_DIM, SIZE, GROUPS, BLOCK_P, BLOCK_N, ROWS,
        )  # fmt: skip
        valid = (q < end - first)[:, None]
        rows = mixed + first.to(tl.int64) * CHANNELS + q[:, None] * CHANNELS
        C = tl.load(rows + c[None, :], mask=valid & (n < SIZE)[None, :], other=0.0)
        y = tl.dot(C, tl.trans(state.to(C.dtype)), input_precision=PRECISION)
        y *= tl.exp2(decay)[:, None]
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        since = tl.where(q[:, None] >= q[None, :], decay[:, None] - decay[None, :], -float("inf"))
        scores *= tl.exp2(since) * step[None, :]
        y = tl.dot(scores.to(x.dtype), x, acc=y, input_precision=PRECISION)
        y += x.to(tl.float32) * skip
        target = (
            out + first.to(tl.int64) * INNER + head * HEAD_DIM + q[:, None] * INNER + p[None, :]
        )
        tl.store(target, y.to(out.dtype.element_ty), mask=valid & (p < HEAD_DIM)[None, :])
        state = _next_state(state, x, B, step, decay, total, PRECISION)
        export = tl.load(exports + part // PARTS).to(tl.int64)
        if (export >= 0) & (part % PARTS == PARTS - 1):
            checkpoint = ssm_states + export * ssm_stride + elements
            tl.store(checkpoint, state.to(ssm_states.dtype.element_ty), mask=inside)
    if tl.load(segment + 4) == 1:
        tl.store(running, state.to(ssm_states.dtype.element_ty), mask=inside)
