"""Causal depthwise convolution with SiLU: ragged chunks (prefill) and one token each (decode).

The state of a sequence is the window of its last `kernel - 1` inputs, oldest first, kept by slot in
`states` [slots, kernel - 1, channels] (any stride between slots). The torch references want zeros
in the slot of a sequence that starts. In Triton, decodes are part of `ssd_decode.py`, and prefills
of `ssd_prepare.py`, for which the device functions are here.
"""

import dataclasses

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class ConvPlan:
    """How a step's prefill tokens are laid out for the convolution.

    Each sequence is preceded by its window, so that one pass over the flat rows serves all.
    slots: [seqs]. token_rows: [tokens], the tokens' rows among the flat rows.
    window_rows: [seqs * (kernel - 1)], the rows that the old windows take.
    export_slots: [exports] and export_rows: [exports * (kernel - 1)]: new windows and checkpoints.
    """

    slots: torch.Tensor
    token_rows: torch.Tensor
    window_rows: torch.Tensor
    export_slots: torch.Tensor
    export_rows: torch.Tensor


def plan(
    query_lens: list[int],
    slots: list[int],
    checkpoints: list[tuple[int, int, int]],
    kernel: int,
    device: torch.device,
) -> ConvPlan:
    """Plan one step's prefill sequences for all layers.

    checkpoints: (sequence, tokens, slot): the window after so many tokens goes to the slot, too.
    """
    width = kernel - 1
    starts: list[int] = []
    total = 0
    for length in query_lens:
        starts.append(total)
        total += width + length
    ends = [(starts[seq] + tokens, slot) for seq, tokens, slot in checkpoints]
    ends += [
        (start + length, slot)
        for start, length, slot in zip(starts, query_lens, slots, strict=True)
    ]
    columns = torch.arange(width)
    window_rows = (torch.tensor(starts)[:, None] + columns).flatten()
    is_token = torch.ones(total, dtype=torch.bool)
    is_token[window_rows] = False
    export_rows = (torch.tensor([row for row, _ in ends])[:, None] + columns).flatten()
    return ConvPlan(
        slots=torch.tensor(slots, device=device),
        token_rows=is_token.nonzero().flatten().to(device),
        window_rows=window_rows.to(device),
        export_slots=torch.tensor([slot for _, slot in ends], device=device),
        export_rows=export_rows.to(device),
    )


def causal_conv1d(
    x: torch.Tensor,
    states: torch.Tensor,
    plan: ConvPlan,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """silu(convolution) of ragged sequences; writes the windows after them, and at checkpoints.

    x: [tokens, channels], any row stride; states: [slots, kernel - 1, channels]; weight: [kernel,
    channels], the last row meets the newest token; bias: [channels] or None.
    Returns [tokens, channels], contiguous.
    """
    kernel, channels = weight.shape
    width = kernel - 1
    padded = x.new_empty(x.shape[0] + len(plan.window_rows), channels)
    windows = states.index_select(0, plan.slots).to(x.dtype)
    padded.index_copy_(0, plan.window_rows, windows.view(-1, channels))
    padded.index_copy_(0, plan.token_rows, x)
    exports = padded.index_select(0, plan.export_rows).view(-1, width, channels)
    states[plan.export_slots] = exports.to(states.dtype)

    length = padded.shape[0] - width
    out = padded[width:] * weight[width]
    for tap in range(width):
        out.addcmul_(padded[tap : tap + length], weight[tap])
    if bias is not None:
        out.add_(bias)
    return F.silu(out.index_select(0, plan.token_rows - width), inplace=True)


def causal_conv1d_update(
    x: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """One token for each of `slots`: silu(convolution) [seqs, channels]; shifts the windows.

    x: [seqs, channels], any row stride; the rest as in `causal_conv1d`.
    """
    window = torch.cat((states.index_select(0, slots).to(x.dtype), x[:, None]), dim=1)
    states[slots] = window[:, 1:].to(states.dtype)
    out = window.mul_(weight).sum(1)
    if bias is not None:
        out.add_(bias)
    return F.silu(out, inplace=True)


@triton.jit
def convolve_block(
    inputs,
    window,
    held,
    weight,
    bias,
    entry,
    channels,
    out,
    row_stride,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Some tokens of one sequence, each input read once; before the first lies the old window."""
    inside = channels < CHANNELS
    first, end, start = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    taps = ()
    rows = ()
    for tap in tl.static_range(KERNEL):
        scale = tl.load(weight + tap * CHANNELS + channels, mask=inside, other=0.0)
        taps += (scale,)  # type: ignore[assignment]
    for tap in tl.static_range(KERNEL - 1):
        row = first - (KERNEL - 1) + tap
        value = _input(inputs, window, held, row, start, channels, row_stride, CHANNELS, KERNEL)
        rows += (value,)  # type: ignore[assignment]
    places = inputs + first.to(tl.int64) * row_stride + channels
    for t in tl.static_range(TOKENS):
        valid = channels < tl.where(t < end - first, CHANNELS, 0)
        value = tl.load(places + t * row_stride, mask=valid, other=0.0)
        rows += (value,)  # type: ignore[assignment]
    shift = tl.zeros(channels.shape, tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    target = out + first.to(tl.int64) * CHANNELS + channels
    for t in tl.static_range(TOKENS):
        total = shift
        for tap in tl.static_range(KERNEL):
            total += rows[t + tap].to(tl.float32) * taps[tap].to(tl.float32)
        result = (total * tl.sigmoid(total)).to(out.dtype.element_ty)
        valid = channels < tl.where(t < end - first, CHANNELS, 0)
        tl.store(target + t * CHANNELS, result, mask=valid)


@triton.jit
def _input(
    inputs,
    window,
    held,
    row,
    start,
    channels,
    row_stride,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """An input row of a sequence; before its first row of the step, out of its old window."""
    in_step = channels < tl.where(row >= start, CHANNELS, 0)
    new = tl.load(inputs + row.to(tl.int64) * row_stride + channels, mask=in_step, other=0.0)
    place = window + (row - start + KERNEL - 1) * CHANNELS
    old = tl.load(place, mask=held & (channels >= tl.where(row >= start, CHANNELS, 0)), other=0.0)
    return tl.where(in_step, new, old)


@triton.jit
def export_window(
    inputs,
    window,
    held,
    states,
    entry,
    channels,
    row_stride,
    slot_stride,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
):
    """The window at a checkpoint, of which the oldest inputs may lie in the old window."""
    inside = channels < CHANNELS
    end, start = tl.load(entry), tl.load(entry + 1)
    target = states + tl.load(entry + 3).to(tl.int64) * slot_stride + channels
    for tap in tl.static_range(KERNEL - 1):
        row = end - (KERNEL - 1) + tap
        value = _input(inputs, window, held, row, start, channels, row_stride, CHANNELS, KERNEL)
        tl.store(target + tap * CHANNELS, value, mask=inside)
