"""Log-probabilities of tokens, their ranks, and the likeliest beside them."""

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import let_next_start, overlaps, use_triton, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import room_for, shares

_BLOCK = 1024


def score(
    logits: torch.Tensor, token_ids: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `token_ids` [T] int64 after rows of `logits` [T, V] float32; does not wait for the device.

    Returns log-probabilities [T] float32; ranks [T] int64, 1 for the likeliest; ids [T, top] int64
    and log-probabilities [T, top] of the likeliest, best first. `top` is cut to V.

    The kernel reads the logits once (4 bytes a token) and writes nothing of their size; torch's
    selection of the likeliest reads them again, only if `top` is not 0.
    """
    top = min(top, logits.shape[1])
    if not use_triton(logits):
        logprobs = logits.log_softmax(dim=-1)
        own = logprobs.gather(1, token_ids[:, None])
        ranks = (logits > logits.gather(1, token_ids[:, None])).sum(dim=-1).add_(1)
        values, indices = logprobs.topk(top, dim=-1)
        return own[:, 0], ranks, indices, values
    own, ranks, totals = _launch(logits, token_ids)
    values, indices = logits.topk(top, dim=-1)
    return own, ranks, indices, values.sub_(totals[:, None])


def _launch(
    logits: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities and ranks of the tokens, and the logarithm of each row's sum."""
    count, size = logits.shape
    parts, share = shares(count, size, _BLOCK)
    partial = torch.empty(count, parts, 2, dtype=torch.float32, device=logits.device)
    ahead = torch.empty(count, parts, dtype=torch.int32, device=logits.device)
    own = torch.empty(count, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(count, dtype=torch.int64, device=logits.device)
    totals = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        pdl = overlaps(logits)
        _sum_of_share[(count, parts)](
            logits, token_ids, partial, ahead, size, logits.stride(0), share,
            BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
        _sum_of_row[(count,)](
            logits, token_ids, partial, ahead, own, ranks, totals, logits.stride(0), parts,
            BLOCK=room_for(parts), PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
    return own, ranks, totals


@quick
@triton.jit
def _sum_of_share(
    logits, token_ids, partial, ahead, size, stride, share, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Of `share` tokens of one row: the greatest logit, the sum of exponentials beside it, and how
    many are above the row's token."""
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    row = logits + i_row * stride
    own = tl.load(row + tl.load(token_ids + i_row))
    greatest = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    end = tl.minimum((i_part + 1) * share, size)
    for first in range(i_part * share, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        value = tl.load(row + index, mask=index < end, other=float("-inf"))
        before = greatest
        greatest = tl.maximum(greatest, value)
        total = total * tl.exp(before - greatest) + tl.exp(value - greatest)
        above += (value > own).to(tl.int32)
    top = tl.max(greatest)
    out = i_row * tl.num_programs(1) + i_part
    tl.store(partial + out * 2, top)
    tl.store(partial + out * 2 + 1, tl.sum(total * tl.exp(greatest - top)))
    tl.store(ahead + out, tl.sum(above))


@quick
@triton.jit(do_not_specialize=["parts"])
def _sum_of_row(
    logits, token_ids, partial, ahead, own, ranks, totals, stride, parts,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    let_next_start(PDL)
    wait_for_previous(PDL)
    at, inside = i_row * parts + lane, lane < parts
    greatest = tl.load(partial + at * 2, mask=inside, other=-1e38)
    total = tl.load(partial + at * 2 + 1, mask=inside, other=0.0)
    top = tl.max(greatest)
    log_total = tl.log(tl.sum(total * tl.exp(greatest - top))) + top
    token = tl.load(token_ids + i_row)
    tl.store(totals + i_row, log_total)
    tl.store(own + i_row, tl.load(logits + i_row * stride + token) - log_total)
    tl.store(ranks + i_row, tl.sum(tl.load(ahead + at, mask=inside, other=0)).to(tl.int64) + 1)
