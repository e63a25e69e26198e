"""Mamba2's state space recurrence, in chunks (prefill) and token by token (decode).

Per head, with decay a_t = exp(dt_t * A) and state S [head_dim, state_size]:

    S_t = a_t * S_{t-1} + dt_t * x_t B_t^T        y_t = S_t C_t + D * x_t

The chunked form (Dao & Gu 2024, section 6) computes a chunk by matrix products and carries the
state between chunks. States lie by slot in `states` [slots, heads, head_dim, state_size] (any
stride between slots). The torch references here want zeros in the slot of a sequence that starts,
and compute in float32. In Triton: `ssd_decode.py`, `ssd_scan.py`.
"""

import dataclasses

import torch
import torch.nn.functional as F

CHUNK = 64
_STEP = 16
"""Widths of segments are multiples of it: a prompt's short rest does not cost a whole chunk."""


@dataclasses.dataclass(frozen=True)
class Mixer:
    """Weights and numbers of one mixer between its two projections.

    conv_weight: [kernel, conv_dim], the last row meets the newest token; conv_bias: [conv_dim] or
    None; A (negative), D, dt_bias: [heads] float32. The sizes conv_dim = heads * head_dim + 2 *
    groups * state_size are those of the states. The gated norm's weight lies in the projection that
    follows.
    """

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor
    groups: int
    eps: float
    dt_limits: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class SsdPlan:
    """A step's prefill tokens cut into segments of at most CHUNK tokens, also at each checkpoint.

    token_rows: [segments, width], the token of each place (0 where there is none); the longest
    segment decides the width. is_padding: [segments, width, 1]. place: [tokens], each token's place
    among segments * width.
    first_slots: per segment, the slot that its sequence starts from; None: goes on from the segment
    before. last_slots: per segment, the slots to which the state after it goes.
    """

    token_rows: torch.Tensor
    is_padding: torch.Tensor
    place: torch.Tensor
    first_slots: list[int | None]
    last_slots: list[list[int]]


def plan(
    query_lens: list[int],
    slots: list[int],
    checkpoints: list[tuple[int, int, int]],
    device: torch.device,
) -> SsdPlan:
    """Plan one step's prefill sequences for all layers.

    checkpoints: (sequence, tokens, slot): the state after so many tokens goes to the slot, too.
    """
    cuts: list[dict[int, list[int]]] = [{} for _ in query_lens]
    for seq, tokens, slot in checkpoints:
        cuts[seq].setdefault(tokens, []).append(slot)
    bounds: list[tuple[int, int]] = []
    first_slots: list[int | None] = []
    last_slots: list[list[int]] = []
    row = 0
    for length, slot, marks in zip(query_lens, slots, cuts, strict=True):
        marks.setdefault(length, []).append(slot)
        start = 0
        for mark in sorted(marks):
            while start < mark:
                end = min(start + CHUNK, mark)
                bounds.append((row + start, row + end))
                first_slots.append(slot if start == 0 else None)
                last_slots.append(marks.get(end, []))
                start = end
        row += length
    starts, ends = torch.tensor(bounds).unbind(1)
    width = -(-int((ends - starts).max()) // _STEP) * _STEP
    token_rows = starts[:, None] + torch.arange(width)
    is_padding = token_rows >= ends[:, None]
    return SsdPlan(
        token_rows=token_rows.masked_fill(is_padding, 0).to(device),
        is_padding=is_padding[:, :, None].to(device),
        place=(~is_padding).flatten().nonzero().flatten().to(device),
        first_slots=first_slots,
        last_slots=last_slots,
    )


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    states: torch.Tensor,
    plan: SsdPlan,
) -> torch.Tensor:
    """The recurrence over ragged sequences; leaves their last states, and checkpoints, in slots.

    x: [tokens, heads, head_dim]; dt: [tokens, heads], positive, float32; A (negative), D: [heads]
    float32; B, C: [tokens, groups, state_size]. Returns y [tokens, heads, head_dim] float32.
    """
    heads, head_dim = x.shape[1:]
    groups = B.shape[1]
    rows = plan.token_rows
    segments, width = rows.shape
    # s: segment, q and k: places in it, g: group, r: head in group, p: head_dim, n: state_size
    xs = x[rows].float().view(segments, width, groups, -1, head_dim).permute(0, 2, 3, 1, 4)  # sgrqp
    step = dt[rows].masked_fill_(plan.is_padding, 0.0)
    step = step.view(segments, width, groups, -1).permute(0, 2, 3, 1)  # sgrq
    Bs = B[rows].float().permute(0, 2, 1, 3)  # sgqn
    Cs = C[rows].float().permute(0, 2, 1, 3)
    decay = (step * A.view(groups, -1, 1)).cumsum(-1)
    end_decay = decay[..., -1:]

    within = torch.ones(width, width, dtype=torch.bool, device=x.device).tril_()
    scores = (decay[..., :, None] - decay[..., None, :]).masked_fill_(~within, -torch.inf).exp_()
    scores.mul_((Cs @ Bs.transpose(-1, -2))[:, :, None]).mul_(step[..., None, :])
    y = scores @ xs

    inputs = xs * (step * (end_decay - decay).exp_())[..., None]
    added = inputs.transpose(-1, -2) @ Bs[:, :, None]  # sgrpn
    before = _carry_states(added, end_decay.exp(), states, plan)
    carried = Cs[:, :, None] @ before.transpose(-1, -2)  # sgrqp
    y.addcmul_(carried, decay.exp()[..., None])
    y.addcmul_(xs, D.view(groups, -1, 1, 1))
    return y.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim).index_select(0, plan.place)


def _carry_states(
    added: torch.Tensor, decay: torch.Tensor, states: torch.Tensor, plan: SsdPlan
) -> torch.Tensor:
    """States before each segment, from what each adds and by what it decays; writes the slots.

    added: [segments, groups, heads / groups, head_dim, state_size]; overwritten by the states after
    each segment. decay: [segments, groups, heads / groups, 1].
    """
    before = torch.empty_like(added)
    for segment, slot in enumerate(plan.first_slots):
        if slot is None:
            before[segment] = added[segment - 1]
        else:
            before[segment] = states[slot].view_as(added[segment])
        added[segment].addcmul_(before[segment], decay[segment][..., None])
        for target in plan.last_slots[segment]:
            states[target] = added[segment].view_as(states[target])
    return before


def selective_state_update(
    states: torch.Tensor,
    slots: list[int],
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """One token for each of `slots`; updates their states in place.

    x: [seqs, heads, head_dim]; dt: [seqs, heads], positive, float32; A (negative), D: [heads]
    float32; B, C: [seqs, groups, state_size]. Returns y [seqs, heads, head_dim] float32.

    One state after the other: it stays in the CPU's cache through its three passes, which is faster
    than a batch of gathered states (16 states of 128 KiB: 0.34 ms against 0.59).
    """
    seqs, heads, head_dim = x.shape
    groups, size = B.shape[1:]
    x, B, C = x.float(), B.float(), C.float()
    rows = heads // groups * head_dim  # of one group's part of a state
    y = x.new_empty(seqs, groups, rows, 1)
    decays = (dt * A).exp_()[:, :, None].expand(-1, -1, head_dim).reshape(y.shape)
    inputs = (x * dt[:, :, None]).view(y.shape)
    parts = (decays, inputs, B[:, :, None], C[:, :, :, None], y)
    by_slot = states.view(-1, groups, rows, size)
    sequences = zip(slots, *(part.unbind(0) for part in parts), strict=True)
    for slot, decay, added, into, out_of, result in sequences:
        stored = by_slot[slot]
        state = stored.float()
        state.mul_(decay).addcmul_(added, into)
        torch.bmm(state, out_of, out=result)
        if state is not stored:
            stored.copy_(state)
    return y.view(seqs, heads, head_dim).addcmul_(x, D[:, None])


def positive_dt(dt: torch.Tensor, bias: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    """softplus(dt + bias) within `limits`, float32; dt: [tokens, heads], bias: [heads] float32."""
    dt = F.softplus(dt.float() + bias)
    if limits == (0.0, float("inf")):
        return dt
    return dt.clamp_(*limits)
