"""The likeliest token of each row of logits, and its way into the next step's inputs."""

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import (
    let_next_start,
    overlaps,
    use_triton,
    wait_for_previous,
)
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import power_of_two, shares

_BLOCK = 2048


def greedy(
    logits: torch.Tensor, rows: torch.Tensor | None = None, last_tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """[R] int64: the first of the likeliest tokens of each row of `logits` [R, V] float32.

    -1 where the greatest is NaN or infinite: there is no distribution. rows [R] int64 and
    last_tokens [rows] int64, if given: last_tokens[rows] = tokens. Reads the logits once.
    """
    if use_triton(logits):
        return _launch(logits, rows, last_tokens)
    best, tokens = logits.max(dim=-1)  # NaN counts as the greatest
    tokens.masked_fill_(~best.isfinite(), -1)
    if rows is not None and last_tokens is not None:
        last_tokens.index_copy_(0, rows, tokens)
    return tokens


def _launch(
    logits: torch.Tensor, rows: torch.Tensor | None, last_tokens: torch.Tensor | None
) -> torch.Tensor:
    count, size = logits.shape
    parts, share = shares(count, size, _BLOCK)
    best = torch.empty(count, parts, dtype=torch.float32, device=logits.device)
    where = torch.empty(count, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    pdl = overlaps(logits)
    _best_of_share[(count, parts)](
        logits, best, where, size, logits.stride(0), share, BLOCK=_BLOCK, PDL=pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    _best_of_row[(count,)](
        best, where, tokens, rows, last_tokens, parts,
        FEED=rows is not None, BLOCK=power_of_two(parts), PDL=pdl,
        num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return tokens


@quick
@triton.jit
def _best_of_share(
    logits, best, where, size, stride, share, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Of `share` tokens of one row: the greatest logit (NaN counts as infinite), the first such."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    let_next_start(PDL)
    wait_for_previous(PDL)
    lane = tl.arange(0, BLOCK)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32) + part * share
    end = tl.minimum((part + 1) * share, size)
    for first in range(part * share, end, BLOCK):
        index = first + lane
        value = tl.load(logits + row * stride + index, mask=index < end, other=float("-inf"))
        value = tl.where(value == value, value, float("inf"))
        better = value > greatest
        greatest = tl.where(better, value, greatest)
        at = tl.where(better, index, at)
    top = tl.max(greatest)
    out = row * tl.num_programs(1) + part
    tl.store(best + out, top)
    tl.store(where + out, tl.min(tl.where(greatest == top, at, 2147483647)))


@quick
@triton.jit
def _best_of_row(
    best, where, tokens, rows, last_tokens, parts,
    FEED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    let_next_start(PDL)
    wait_for_previous(PDL)
    value = tl.load(best + row * parts + lane, mask=lane < parts, other=float("-inf"))
    index = tl.load(where + row * parts + lane, mask=lane < parts, other=2147483647)
    top = tl.max(value)
    token = tl.min(tl.where(value == top, index, 2147483647)).to(tl.int64)
    failed = (top == float("inf")) | (top == float("-inf"))
    token = tl.where(failed, -1, token)
    tl.store(tokens + row, token)
    if FEED:
        tl.store(last_tokens + tl.load(rows + row), token)
