"""The Mamba2 mixer between its two projections: convolution, state space, gated norm.

One call on every device. On CUDA a layer's decodes take two launches (`ssd_decode.py`,
`gated_norm.py`), its prefill parts two to four more (`ssd_prepare.py`, `ssd_scan.py`).
"""

import dataclasses
from collections.abc import Sequence

import torch

from tasuki_kernels import conv1d, ssd, ssd_decode, ssd_plan, ssd_prepare, ssd_scan
from tasuki_kernels.backend import use_triton
from tasuki_kernels.gated_norm import gated_rms_norm, gated_rms_norm_and_windows_
from tasuki_kernels.ssd import Mixer


@dataclasses.dataclass(frozen=True)
class StateBatch:
    """A step's sequences as the recurrent layers see them; decodes, of one token each, come first.

    slots: [seqs]; context_lens: [seqs]; query_start: [seqs + 1]. A sequence whose context is its
    length in this step starts from zero, whatever its slot holds; context 0 is a padded row.
    """

    slots: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor
    num_decodes: int
    prefill: ssd_plan.PrefillPlan | None
    reference: "_ReferencePlan | None"


@dataclasses.dataclass(frozen=True)
class _ReferencePlan:
    """What the torch references want to know, on the host where they do."""

    fresh_slots: list[int]
    decode_slots: list[int]
    decode_rows: torch.Tensor
    """The same as a tensor."""
    conv: conv1d.ConvPlan | None
    ssd: ssd.SsdPlan | None


def plan(
    *,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    num_decodes: int,
    query_lens: Sequence[int] | None,
    checkpoints: Sequence[tuple[int, int, int]],
    kernel: int,
    heads: int,
) -> StateBatch:
    """Plan a step for all recurrent layers; a step of decodes alone runs nothing on the device.

    slots: [seqs] int32 or int64; context_lens: [seqs] and query_start: [seqs + 1] int32.
    query_lens: tokens of each sequence, on the host; not read in a step of decodes alone.
    checkpoints: (sequence, tokens, slot): the state after so many tokens of the sequence's part,
    fewer than it has, goes to the slot, too. kernel: of the convolution; heads: of the state space.
    """
    prefill = reference = None
    lens = list(query_lens[num_decodes:]) if query_lens and len(slots) > num_decodes else []
    marks = [(seq - num_decodes, tokens, slot) for seq, tokens, slot in checkpoints]
    if not use_triton(slots):
        reference = _reference_plan(
            slots, context_lens, query_start, num_decodes, lens, marks, kernel
        )
    elif lens:
        prefill = ssd_plan.plan_prefill(
            lens, marks, slots[num_decodes:], context_lens[num_decodes:], heads
        )
    return StateBatch(slots, context_lens, query_start, num_decodes, prefill, reference)


def mix(
    projected: torch.Tensor,
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    mixer: Mixer,
    batch: StateBatch,
) -> torch.Tensor:
    """What the output projection takes: [tokens, heads * head_dim] in projected's dtype.

    The weight of the gated norm is the projection's: here it has none.

    projected: [tokens, inner + conv_dim + heads], any row stride: gate, the convolution's inputs
    (x, B, C) and dt; conv_states: [slots, kernel - 1, conv_dim] and ssm_states: [slots, heads,
    head_dim, state_size], any slot stride, updated in place. In Triton there may be padding behind
    the sequences' rows, which gets zeros.
    """
    if batch.reference is not None:
        return _mix_reference(projected, conv_states, ssm_states, mixer, batch.reference)
    decodes, tokens = batch.num_decodes, projected.shape[0]
    heads, head_dim = ssm_states.shape[1:3]
    y = projected.new_empty((tokens, heads * head_dim))
    if decodes:
        ssd_decode.decode(
            projected[:decodes],
            conv_states,
            ssm_states,
            batch.slots[:decodes],
            batch.context_lens[:decodes],
            mixer,
            y,
        )
    if batch.prefill is not None:
        rest, out = (projected[decodes:], y[decodes:]) if decodes else (projected, y)
        mixed, times = ssd_prepare.prepare(rest, conv_states, mixer, batch.prefill)
        ssd_scan.chunk_scan(mixed, times, ssm_states, mixer, batch.prefill, out)
    gated_rms_norm_and_windows_(
        y,
        projected,
        mixer.eps,
        mixer.groups,
        conv_states,
        batch.slots,
        batch.context_lens,
        batch.query_start,
    )
    return y


def _reference_plan(
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    num_decodes: int,
    lens: list[int],
    checkpoints: list[tuple[int, int, int]],
    kernel: int,
) -> _ReferencePlan:
    slots_host: list[int] = slots.tolist()
    fresh: list[int] = slots[context_lens == query_start.diff()].tolist()
    conv_plan = scan_plan = None
    if lens:
        prefill_slots = slots_host[num_decodes:]
        conv_plan = conv1d.plan(lens, prefill_slots, checkpoints, kernel, slots.device)
        scan_plan = ssd.plan(lens, prefill_slots, checkpoints, slots.device)
    decodes = slots_host[:num_decodes]
    return _ReferencePlan(fresh, decodes, slots[:num_decodes].long(), conv_plan, scan_plan)


def _mix_reference(
    projected: torch.Tensor,
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    mixer: Mixer,
    plan: _ReferencePlan,
) -> torch.Tensor:
    for slot in plan.fresh_slots:
        conv_states[slot].zero_()
        ssm_states[slot].zero_()
    inner, channels = ssm_states.shape[1] * ssm_states.shape[2], conv_states.shape[2]
    gate, conv_in, dt = torch.split(projected, [inner, channels, len(mixer.D)], dim=-1)
    dt = ssd.positive_dt(dt, mixer.dt_bias, mixer.dt_limits)
    decodes = len(plan.decode_slots)
    parts: list[torch.Tensor] = []
    if decodes:
        mixed = conv1d.causal_conv1d_update(
            conv_in[:decodes], conv_states, plan.decode_rows, mixer.conv_weight, mixer.conv_bias
        )
        x, B, C = _split(mixed, ssm_states, mixer.groups)
        parts.append(
            ssd.selective_state_update(
                ssm_states, plan.decode_slots, x, dt[:decodes], mixer.A, B, C, mixer.D
            )
        )
    if plan.conv is not None and plan.ssd is not None:
        mixed = conv1d.causal_conv1d(
            conv_in[decodes:], conv_states, plan.conv, mixer.conv_weight, mixer.conv_bias
        )
        x, B, C = _split(mixed, ssm_states, mixer.groups)
        parts.append(ssd.chunk_scan(x, dt[decodes:], mixer.A, B, C, mixer.D, ssm_states, plan.ssd))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return gated_rms_norm(y.flatten(1), gate, mixer.eps, mixer.groups)


def _split(
    mixed: torch.Tensor, ssm_states: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [tokens, heads, head_dim], B and C [tokens, groups, state_size], of the convolution."""
    heads, head_dim, size = ssm_states.shape[1:]
    x, B, C = torch.split(mixed, [heads * head_dim, groups * size, groups * size], dim=-1)
    return (
        x.view(-1, heads, head_dim),
        B.view(-1, groups, size),
        C.view(-1, groups, size),
    )
