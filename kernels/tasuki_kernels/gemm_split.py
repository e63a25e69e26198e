"""Products of some ten rows with a weight matrix, in pieces small enough for the whole card.

A program has a tile of outputs and a part of the columns. Parts are summed by whichever program of
a tile comes last, always in the order of the columns: the same inputs give the same bits. Bias,
activation and residual are that program's as well, and the norm of x: every program adds the
squares of what it reads of x, and a row's factor is applied to its sums.

Bytes: W once; x once per tile of outputs; float32 sums of the parts written and read once, in
cache. Operations: 2 * rows for each weight, on the tensor cores (float32: exact, on the others).
"""

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from tasuki_kernels.activation import relu2, silu
from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.norm import RmsNorm
from tasuki_kernels.sizes import blocks, power_of_two
from tasuki_kernels.tuning import Choice

_arrivals = WeakTensorKeyDictionary()


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    choice: Choice,
    *,
    norm: RmsNorm | None = None,
    activation: str | None = None,
    scale: float | None = None,
) -> None:
    """out = activation(norm(x) W^T + b), or with a `scale`: out += scale * (...).

    x: [rows, in], any row stride; weight: [out, in] contiguous ([2 * out, in] for "swiglu", the
    gate's rows first); out: [rows, out], any row stride; norm: its weight lies in W. One product
    with a weight must have ended before the next one with the same weight starts.

    choice: BLOCK_OUT rows of W for a program (half of them gate, half up for "swiglu"); SPLIT parts
    of the columns, each a multiple of BLOCK_IN; EARLY: the next kernel may start at once, not only
    after the last load; PREFETCH: so many columns of each part's weights are called into cache
    while waiting.
    """
    rows, inputs = x.shape
    tiles = blocks(weight.shape[0], choice["BLOCK_OUT"])
    block_rows = max(16, power_of_two(rows))
    sums = arrivals = None
    if choice["SPLIT"] > 1:
        size = tiles * choice["SPLIT"] * (choice["BLOCK_OUT"] + 1) * block_rows
        sums = torch.empty(size, dtype=torch.float32, device=x.device)
        arrivals = _arrivals_of(weight, tiles)
    pdl = overlaps(x)
    _split_kernel[(tiles, choice["SPLIT"])](
        x, weight, bias, out, sums, arrivals, rows, x.stride(0), out.stride(0),
        1.0 if scale is None else scale, norm.eps if norm else 0.0,
        OUT=out.shape[1], IN=inputs, NORM=norm is not None, ACTIVATION=activation,
        ADD=scale is not None, BLOCK_ROWS=block_rows, PDL=pdl, launch_pdl=pdl, **choice,
    )  # fmt: skip


def _arrivals_of(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """Counters of this weight's tiles; every kernel leaves them at zero.

    Graphs keep their addresses: those of each number of tiles stay for as long as the weight.
    """
    found: dict[int, torch.Tensor] = _arrivals.setdefault(weight, {})  # type: ignore[no-untyped-call]
    if tiles not in found:
        found[tiles] = torch.zeros(tiles, dtype=torch.int32, device=weight.device)
    return found[tiles]


@quick
@triton.jit(do_not_specialize=["rows"])
def _split_kernel(
    x, weight, bias, out, sums, arrivals, rows, x_stride, out_stride, scale, eps,
    OUT: tl.constexpr, IN: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, part of the columns)."""
    let_next_start(PDL and EARLY)
    TILE: tl.constexpr = BLOCK_OUT // 2 if ACTIVATION == "swiglu" else BLOCK_OUT
    PART: tl.constexpr = IN // SPLIT
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    o_row, o_in = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_IN)
    o_weight = tl.arange(0, BLOCK_OUT)
    # Past the end the last row is read again; the second half of a gated tile are rows of `up`.
    o_out = tl.minimum(i_tile * TILE + o_weight % TILE, OUT - 1) + o_weight // TILE * OUT
    p_weight = weight + o_out.to(tl.int64) * IN + i_part * PART
    if PDL and PREFETCH > 0:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0", "=r,l,r",
            [p_weight, o_weight * 0 + PREFETCH * weight.dtype.element_ty.primitive_bitwidth // 8],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    wait_for_previous(PDL)
    p_x = x + o_row[None, :] * x_stride + i_part * PART + o_in[:, None]
    b_sum = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    b_squares = tl.zeros([BLOCK_IN, BLOCK_ROWS], tl.float32)
    for i in tl.range(0, PART, BLOCK_IN, num_stages=STAGES):
        b_weight = tl.load(p_weight[:, None] + (i + o_in)[None, :], eviction_policy="evict_first")
        b_x = tl.load(p_x + i, mask=(o_row < rows)[None, :], other=0.0)
        b_sum = tl.dot(b_weight, b_x, b_sum, input_precision="ieee")
        if NORM:
            wide = b_x.to(tl.float32)
            b_squares += wide * wide
    let_next_start(PDL)
    squares = tl.sum(b_squares, axis=0)
    last = i_part == SPLIT - 1
    if SPLIT > 1:
        # Of each part: its sums, and behind them its squares.
        PIECE: tl.constexpr = (BLOCK_OUT + 1) * BLOCK_ROWS
        p_squares = sums + i_tile * SPLIT * PIECE + BLOCK_OUT * BLOCK_ROWS + o_row
        p_sum = sums + i_tile * SPLIT * PIECE + o_weight[:, None] * BLOCK_ROWS + o_row[None, :]
        tl.store(p_sum + i_part * PIECE, b_sum, cache_modifier=".cg")
        if NORM:
            tl.store(p_squares + i_part * PIECE, squares, cache_modifier=".cg")
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + i_tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(arrivals + i_tile, 0)
            b_sum = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
            squares = tl.zeros([BLOCK_ROWS], tl.float32)
            for part in tl.static_range(SPLIT):
                b_sum += tl.load(p_sum + part * PIECE, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(p_squares + part * PIECE, cache_modifier=".cg")
    if last:
        if NORM:
            b_sum *= (1.0 / tl.sqrt(squares / IN + eps))[None, :]
        _finish(
            b_sum, bias, out, rows, out_stride, scale, i_tile * TILE, o_row,
            OUT, TILE, ACTIVATION, ADD,
        )  # fmt: skip


@triton.jit
def _finish(
    b_sum, bias, out, rows, out_stride, scale, first, o_row,
    OUT: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of a whole tile, [TILE, rows] or, gated, [2 * TILE, rows]."""
    o_out = first + tl.arange(0, TILE)
    inside = o_out < OUT
    y = b_sum
    if ACTIVATION == "swiglu":
        halves = tl.reshape(b_sum, [2, TILE, b_sum.shape[1]])
        y, up = tl.split(tl.permute(halves, [1, 2, 0]))
        if bias is not None:
            up += tl.load(bias + OUT + o_out, mask=inside, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        y += tl.load(bias + o_out, mask=inside, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION == "swiglu":
        y = silu(y) * up
    elif ACTIVATION == "relu2":
        y = relu2(y)
    p_out = out + o_row[None, :] * out_stride + o_out[:, None]
    written = (o_row < rows)[None, :] & inside[:, None]
    if ADD:
        y = tl.load(p_out, mask=written, other=0.0).to(tl.float32) + scale * y
    tl.store(p_out, y.to(out.dtype.element_ty), mask=written)
