"""RMSNorm of a gated input by groups (Mamba2's; the gate acts first), and the windows' last step.

The windows of the convolution move on in the same launch: all that reads them is done by then. The
norm's weight lies in the projection that follows.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tasuki_kernels.activation import silu
from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.norm import normalize
from tasuki_kernels.sizes import blocks, power_of_two

_WINDOW_BLOCK = 1024


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, eps: float, groups: int) -> torch.Tensor:
    """RMSNorm of x * silu(gate) within each of `groups` equal parts of the last dimension.

    x, gate: [tokens, d]; returns [tokens, d] in the gate's dtype. The gate acts before the norm
    (`norm_before_gate=False` in Mamba2's reference). The torch reference.
    """
    gated = F.silu(gate.float()).mul_(x)
    parts = gated if groups == 1 else gated.view(len(gated), groups, -1)
    return normalize(parts, eps).view_as(gated).to(gate.dtype)


def gated_rms_norm_and_windows_(
    x: torch.Tensor,
    projected: torch.Tensor,
    eps: float,
    groups: int,
    conv_states: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
) -> None:
    """`gated_rms_norm` in place, and each window becomes its last inputs: one Triton launch.

    x: [tokens, d], contiguous; projected: [tokens, d + conv_dim + ...], any row stride: the gate,
    then the convolution's inputs; conv_states: [slots, kernel - 1, conv_dim], any slot stride;
    slots, context_lens: [seqs]; query_start: [seqs + 1]. A sequence of context 0 is skipped; rows
    behind the last sequence may hold anything and get zeros.
    Reads x, gate and the last inputs once, writes [tokens, d] and the windows: 6 bytes an element
    in bfloat16, so bound by memory.
    """
    tokens, size = x.shape
    width, channels = conv_states.shape[1:]
    group = size // groups
    block = power_of_two(group)
    pdl = overlaps(x)
    num_seqs = slots.shape[0]
    window_blocks = blocks(channels, _WINDOW_BLOCK)
    _gated_norm_kernel[(num_seqs * window_blocks + tokens * groups,)](
        x,
        projected,
        conv_states,
        slots,
        context_lens,
        query_start,
        num_seqs,
        projected.stride(0),
        conv_states.stride(0),
        eps,
        GROUPS=groups,
        GROUP=group,
        BLOCK=block,
        CHANNELS=channels,
        WIDTH=width,
        TAPS=power_of_two(width),
        WINDOW_BLOCK=_WINDOW_BLOCK,
        WINDOW_BLOCKS=window_blocks,
        PDL=pdl,
        num_warps=min(max(block // 512, 1), 8),
        launch_pdl=pdl,
    )


@quick
@triton.jit(
    do_not_specialize=["num_seqs"],
    do_not_specialize_on_alignment=["slots", "context_lens", "query_start"],
)
def _gated_norm_kernel(
    x,
    projected,
    conv_states,
    slots,
    context_lens,
    query_start,
    num_seqs,
    row_stride,
    slot_stride,
    eps,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    WINDOW_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    program = tl.program_id(0)
    if program < num_seqs * WINDOW_BLOCKS:
        _move_window(
            projected + GROUPS * GROUP,
            conv_states,
            slots,
            context_lens,
            query_start,
            program,
            row_stride,
            slot_stride,
            CHANNELS,
            WIDTH,
            TAPS,
            WINDOW_BLOCK,
            WINDOW_BLOCKS,
            PDL,
        )
    else:
        part = program - num_seqs * WINDOW_BLOCKS
        row, group = (part // GROUPS).to(tl.int64), part % GROUPS
        columns = group * GROUP + tl.arange(0, BLOCK)
        inside = columns < (group + 1) * GROUP
        end = tl.load(query_start + num_seqs)
        wait_for_previous(PDL)
        gate = tl.load(projected + row * row_stride + columns, mask=inside, other=0.0)
        places = x + row * (GROUPS * GROUP) + columns
        value = tl.load(places, mask=inside, other=0.0)
        gated = value.to(tl.float32) * silu(gate.to(tl.float32))
        factor = tl.rsqrt(tl.sum(gated * gated, 0) / GROUP + eps)
        result = tl.where(row < end, gated * factor, 0.0)
        tl.store(places, result.to(value.dtype), mask=inside)


@triton.jit
def _move_window(
    inputs,
    conv_states,
    slots,
    context_lens,
    query_start,
    program,
    row_stride,
    slot_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    WINDOW_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Of one sequence and block of channels: the window after its part of the step."""
    seq, block = program // WINDOW_BLOCKS, program % WINDOW_BLOCKS
    start = tl.load(query_start + seq).to(tl.int64)
    length = tl.load(query_start + seq + 1) - start
    context = tl.load(context_lens + seq)
    window = conv_states + tl.load(slots + seq).to(tl.int64) * slot_stride
    channels = block * WINDOW_BLOCK + tl.arange(0, WINDOW_BLOCK)[None, :]
    taps = tl.arange(0, TAPS)[:, None]
    inside = (channels < tl.where(context > 0, CHANNELS, 0)) & (taps < WIDTH)
    held = inside & (channels < tl.where(context > length, CHANNELS, 0))
    place = length - WIDTH + taps  # in the part; before it: in the old window
    old = tl.load(
        window + (length + taps) * CHANNELS + channels,
        mask=held & (place < 0),
        other=0.0,
    )
    wait_for_previous(PDL)  # the old window is of earlier steps
    new = tl.load(
        inputs + (start + place) * row_stride + channels, mask=inside & (place >= 0), other=0.0
    )
    tl.debug_barrier()  # other threads' loads of places that are overwritten now
    tl.store(window + taps * CHANNELS + channels, tl.where(place >= 0, new, old), mask=inside)
