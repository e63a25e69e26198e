"""One token of each sequence through convolution and state space, in one launch.

Source of the recurrence: `ssd.py`. Every program computes the convolution's B and C of its group
anew, from 4 values a channel in L2: cheaper than a launch of its own, and at large batch hidden
behind the states' bytes. The windows are read only; `gated_norm.py` moves them on afterwards, when
no program needs the old ones any more.

States and windows are older than this layer: they are asked for before the wait for the projection.
"""

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks, power_of_two
from tasuki_kernels.ssd import Mixer


def decode(
    projected: torch.Tensor,
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    mixer: Mixer,
    out: torch.Tensor,
) -> None:
    """Writes y of one token per sequence to `out`, and the states after it to their slots.

    projected: [seqs, inner + conv_dim + heads], any row stride: gate (not read), the convolution's
    inputs x, B, C, and dt; conv_states: [slots, kernel - 1, conv_dim], read; ssm_states: [slots,
    heads, head_dim, state_size], float32 or bfloat16, in place; both with any slot stride.
    slots, context_lens: [seqs]; context 1: the state is still zero, and its slot may hold anything;
    context 0: a padded row, which gets zeros and touches no slot. out: [seqs, inner], contiguous.

    Moves 2 * heads * head_dim * state_size elements of state a sequence (granite: 4 MiB in
    float32), 5 operations each: bound by memory. Everything is computed in float32, with the
    convolution's results rounded to the model's dtype as the prefill does.
    """
    heads, head_dim, size = ssm_states.shape[1:]
    seqs = slots.shape[0]
    block_p = min(_rows_per_program(ssm_states, seqs), power_of_two(head_dim))
    grid = (heads * blocks(head_dim, block_p), seqs)
    bias = mixer.conv_bias
    pdl = overlaps(projected)
    _ssd_decode_kernel[grid](
        projected,
        conv_states,
        ssm_states,
        slots,
        context_lens,
        mixer.conv_weight,
        mixer.conv_weight if bias is None else bias,
        mixer.A,
        mixer.D,
        mixer.dt_bias,
        out,
        projected.stride(0),
        conv_states.stride(0),
        ssm_states.stride(0),
        *mixer.dt_limits,
        HEADS=heads,
        HEAD_DIM=head_dim,
        SIZE=size,
        GROUPS=mixer.groups,
        KERNEL=mixer.conv_weight.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK_P=block_p,
        BLOCK_N=power_of_two(size),
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )


def _rows_per_program(states: torch.Tensor, seqs: int) -> int:
    """Rows of a head's state for one warp: the fastest of 4, 8, 16 and 32 on an H200.

    Few heads want many programs, small states want long ones, and registers end at 4,096 elements.
    """
    size = power_of_two(states.shape[-1])
    is_float32 = states.dtype == torch.float32
    if is_float32 and states.shape[1] * seqs <= 256:
        return 4
    elements = 4096 if is_float32 or size <= 128 else 2048
    return min(max(elements // size, 1), 32)


@triton.jit
def _past(
    window,
    weight,
    bias,
    channels,
    inside,
    held,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """What the tokens before give to the convolution of some channels, and the bias."""
    total = tl.zeros(channels.shape, tl.float32)
    for tap in tl.static_range(KERNEL - 1):
        old = tl.load(window + tap * CHANNELS + channels, mask=held, other=0.0)
        taps = tl.load(weight + tap * CHANNELS + channels, mask=inside, other=0.0)
        total += old.to(tl.float32) * taps
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=inside, other=0.0)
    return total


@triton.jit
def _convolved(inputs, inside, past, tap):
    """silu(convolution) of the newest token, rounded as the prefill does."""
    newest = tl.load(inputs, mask=inside, other=0.0)
    total = past + newest.to(tl.float32) * tap
    return (total * tl.sigmoid(total)).to(newest.dtype).to(tl.float32)


@triton.jit
def positive_dt(raw, bias, low, high):
    """softplus(raw + bias) within limits; exact for small results too, as log1p is."""
    value = raw.to(tl.float32) + bias
    grown = tl.exp(tl.minimum(value, 20.0))
    rounded = 1.0 + grown
    kept = tl.where(rounded == 1.0, 1.0, rounded - 1.0)  # of grown, after rounding
    log1p = tl.where(rounded == 1.0, grown, tl.log(rounded) * (grown / kept))
    return tl.minimum(tl.maximum(tl.where(value > 20.0, value, log1p), low), high)


@quick
@triton.jit(do_not_specialize_on_alignment=["slots", "context_lens"])
def _ssd_decode_kernel(
    projected,
    conv_states,
    ssm_states,
    slots,
    context_lens,
    conv_weight,
    conv_bias,
    A,
    D,
    dt_bias,
    out,
    row_stride,
    conv_stride,
    ssm_stride,
    dt_low,
    dt_high,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    INNER: tl.constexpr = HEADS * HEAD_DIM
    CHANNELS: tl.constexpr = INNER + 2 * GROUPS * SIZE
    PER_HEAD: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    head, seq = tl.program_id(0) // PER_HEAD, tl.program_id(1)
    p = tl.program_id(0) % PER_HEAD * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_p, in_n = p < HEAD_DIM, n < SIZE
    let_next_start(PDL)
    decay_rate, skip, dt_shift = tl.load(A + head), tl.load(D + head), tl.load(dt_bias + head)
    slot = tl.load(slots + seq).to(tl.int64)
    context = tl.load(context_lens + seq)
    target = out + seq.to(tl.int64) * INNER + head * HEAD_DIM + p
    held_p = p < tl.where(context > 1, HEAD_DIM, 0)  # nothing is held before the first token
    held_n = n < tl.where(context > 1, SIZE, 0)
    places = ssm_states + slot * ssm_stride + (head * HEAD_DIM + p)[:, None] * SIZE + n[None, :]
    state = tl.load(places, mask=in_p[:, None] & held_n[None, :], other=0.0).to(tl.float32)
    inputs = projected + seq.to(tl.int64) * row_stride + INNER
    window = conv_states + slot * conv_stride
    x_at = head * HEAD_DIM + p
    b_at = INNER + head // (HEADS // GROUPS) * SIZE + n
    c_at = b_at + GROUPS * SIZE
    x_past = _past(window, conv_weight, conv_bias, x_at, in_p, held_p, CHANNELS, KERNEL, HAS_BIAS)
    b_past = _past(window, conv_weight, conv_bias, b_at, in_n, held_n, CHANNELS, KERNEL, HAS_BIAS)
    c_past = _past(window, conv_weight, conv_bias, c_at, in_n, held_n, CHANNELS, KERNEL, HAS_BIAS)
    newest_taps = conv_weight + (KERNEL - 1) * CHANNELS
    x_tap = tl.load(newest_taps + x_at, mask=in_p, other=0.0)
    b_tap = tl.load(newest_taps + b_at, mask=in_n, other=0.0)
    c_tap = tl.load(newest_taps + c_at, mask=in_n, other=0.0)
    wait_for_previous(PDL)
    if context == 0:
        tl.store(target, tl.zeros([BLOCK_P], out.dtype.element_ty), mask=in_p)
    else:
        x = _convolved(inputs + x_at, in_p, x_past, x_tap)
        B = _convolved(inputs + b_at, in_n, b_past, b_tap)
        C = _convolved(inputs + c_at, in_n, c_past, c_tap)
        raw = tl.load(inputs + CHANNELS + head)
        dt = positive_dt(raw, dt_shift, dt_low, dt_high)
        decay = tl.exp(dt * decay_rate)
        state = state * decay + (dt * x)[:, None] * B[None, :]
        inside = in_p[:, None] & in_n[None, :]
        tl.store(places, state.to(ssm_states.dtype.element_ty), mask=inside)
        y = tl.sum(state * C[None, :], 1) + skip * x
        tl.store(target, y.to(out.dtype.element_ty), mask=in_p)
