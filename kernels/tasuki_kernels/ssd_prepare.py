"""What a prefill's scan wants, in one launch: the convolution, its checkpoints, dt and decays."""

import torch
import triton
import triton.language as tl

from tasuki_kernels.conv1d import convolve_block, export_window
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks
from tasuki_kernels.ssd import Mixer
from tasuki_kernels.ssd_decode import positive_dt
from tasuki_kernels.ssd_plan import CHUNK, CONV_BLOCK, PrefillPlan

_LOG2E = tl.constexpr(1.4426950408889634)
_CHANNEL_BLOCK = 256
_HEAD_BLOCK = 32


def rows_at_once(dtype: torch.dtype) -> int:
    """Tokens of a chunk that are multiplied at a time: float32's exact products fill registers."""
    return 16 if dtype == torch.float32 else CHUNK


def prepare(
    projected: torch.Tensor,
    conv_states: torch.Tensor,
    mixer: Mixer,
    plan: PrefillPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(convolution) [tokens, conv_dim], and times [2, heads, tokens] float32: dt and decays.

    projected: [tokens, inner + conv_dim + heads], any row stride: gate (not read), the
    convolution's inputs, dt before bias and softplus; conv_states: [slots, kernel - 1, conv_dim],
    any slot stride: old windows are read, those of checkpoints are written, the rest moves on in
    `gated_norm.py`. times[1] is the base-2 logarithm of the decay since the rows that are
    multiplied at once began.

    Reads and writes conv_dim elements a token, 4 bytes each in bfloat16, so bound by memory.
    """
    tokens, heads = projected.shape[0], mixer.D.shape[0]
    kernel, channels = mixer.conv_weight.shape
    parts = CHUNK // rows_at_once(projected.dtype)
    bias = mixer.conv_bias
    mixed = projected.new_empty((tokens, channels))
    times = projected.new_empty((2, heads, tokens), dtype=torch.float32)
    num_blocks = plan.conv_blocks.shape[0]
    convolutions = num_blocks + plan.conv_exports.shape[0]
    width = max(blocks(channels, _CHANNEL_BLOCK), blocks(heads, _HEAD_BLOCK))
    _ssd_prepare_kernel[(width, convolutions + plan.exports.shape[0] * parts)](
        projected,
        conv_states,
        plan.slots,
        plan.context_lens,
        plan.lens,
        mixer.conv_weight,
        mixer.conv_weight if bias is None else bias,
        mixer.dt_bias,
        mixer.A,
        plan.conv_blocks,
        plan.conv_exports,
        plan.bounds,
        mixed,
        times,
        tokens,
        num_blocks,
        convolutions,
        projected.stride(0),
        conv_states.stride(0),
        *mixer.dt_limits,
        INNER=projected.shape[1] - channels - heads,
        CHANNELS=channels,
        KERNEL=kernel,
        HAS_BIAS=bias is not None,
        TOKENS=CONV_BLOCK,
        BLOCK=_CHANNEL_BLOCK,
        HEADS=heads,
        HEAD_BLOCK=_HEAD_BLOCK,
        PARTS=parts,
        ROWS=CHUNK // parts,
        num_warps=2,
    )
    return mixed, times


@quick
@triton.jit(
    do_not_specialize=["tokens", "num_blocks", "convolutions"],
    do_not_specialize_on_alignment=["slots", "context_lens"],  # they begin where decodes end
)
def _ssd_prepare_kernel(
    projected,
    conv_states,
    slots,
    context_lens,
    lens,
    weight,
    bias,
    dt_bias,
    A,
    conv_blocks,
    conv_exports,
    bounds,
    mixed,
    times,
    tokens,
    num_blocks,
    convolutions,
    row_stride,
    slot_stride,
    dt_low,
    dt_high,
    INNER: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    job = tl.program_id(1)
    if job >= convolutions:
        dt = projected + INNER + CHANNELS
        _times(
            dt, dt_bias, A, times, bounds, job - convolutions, row_stride, tokens, dt_low, dt_high,
            HEADS, HEAD_BLOCK, PARTS, ROWS,
        )  # fmt: skip
    else:
        channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        if job < num_blocks:
            entry = conv_blocks + job * 4
            seq = tl.load(entry + 3)
        else:
            entry = conv_exports + (job - num_blocks) * 4
            seq = tl.load(entry + 2)
        held = channels < tl.where(tl.load(context_lens + seq) > tl.load(lens + seq), CHANNELS, 0)
        window = conv_states + tl.load(slots + seq).to(tl.int64) * slot_stride + channels
        if job < num_blocks:
            convolve_block(
                projected + INNER, window, held, weight, bias, entry, channels, mixed, row_stride,
                CHANNELS, KERNEL, HAS_BIAS, TOKENS,
            )  # fmt: skip
        else:
            export_window(
                projected + INNER, window, held, conv_states, entry, channels, row_stride,
                slot_stride, CHANNELS, KERNEL,
            )  # fmt: skip


@triton.jit
def part_rows(bounds, part, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """First and end row of a part of a chunk; an empty part begins where, or after, it ends."""
    chunk = part // PARTS
    first = tl.load(bounds + chunk) + part % PARTS * ROWS
    return first, tl.minimum(tl.load(bounds + chunk + 1), first + ROWS)


@triton.jit
def _times(
    dt,
    dt_bias,
    A,
    times,
    bounds,
    part,
    row_stride,
    tokens,
    dt_low,
    dt_high,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dt and decays of some rows and heads.

    Not in the scan itself, because its products want them along rows and along columns and would
    compute them many times over.
    """
    first, end = part_rows(bounds, part, PARTS, ROWS)
    heads = tl.program_id(0) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    rows = first + tl.arange(0, ROWS)
    inside = (rows < end)[:, None] & (heads < HEADS)[None, :]
    places = dt + rows.to(tl.int64)[:, None] * row_stride + heads[None, :]
    raw = tl.load(places, mask=inside, other=0.0)
    bias = tl.load(dt_bias + heads, mask=heads < HEADS, other=0.0)
    rate = tl.load(A + heads, mask=heads < HEADS, other=0.0) * _LOG2E
    step = positive_dt(raw, bias[None, :], dt_low, dt_high)
    target = times + heads.to(tl.int64)[None, :] * tokens + rows[:, None]
    tl.store(target, step, mask=inside)
    decay = tl.cumsum(step * rate[None, :], 0)
    tl.store(target + HEADS * tokens.to(tl.int64), decay, mask=inside)
