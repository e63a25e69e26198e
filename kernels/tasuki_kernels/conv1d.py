"""Causal depthwise convolution with SiLU: ragged chunks (prefill) and one token each (decode).

The state of a sequence is the window of its last `kernel - 1` inputs, oldest first, kept by slot in
`states` [slots, kernel - 1, channels] (any stride between slots). A sequence that starts must find
zeros in its slot.
"""

import dataclasses

import torch
import torch.nn.functional as F


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
