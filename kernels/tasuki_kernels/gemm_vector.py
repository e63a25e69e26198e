"""The product of one row with a weight matrix, at the pace at which weights can be read.

Each program holds all columns of some rows of W in registers: it asks for them before it waits for
the kernel in front, so that the weights of a decode step stream without a pause. What stands around
a product costs nothing here: every program recomputes the norm of x, which it reads anyway, and has
whole outputs in hand for bias, activation and residual. There is no split over columns, and sums
have one order: the same inputs give the same bits.

Bytes: W once; x once per program, from cache. Operations: 2 for each weight, on the vector units.
"""

import torch
import triton
import triton.language as tl

from tasuki_kernels.activation import relu2, silu
from tasuki_kernels.backend import let_next_start, overlaps, wait_for_previous
from tasuki_kernels.launcher import quick
from tasuki_kernels.norm import RmsNorm
from tasuki_kernels.sizes import blocks, power_of_two
from tasuki_kernels.tuning import Choice


def default_choice(outputs: int, inputs: int) -> Choice:
    """A sound choice where nothing was measured: 32 weights of each row for a thread, or fewer."""
    block = power_of_two(inputs)
    warps = max(1, min(8, block // 1024))
    return {"BLOCK_OUT": 2 if outputs >= 1024 else 1, "BLOCK_IN": block, "num_warps": warps}


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

    x: [1, in]; weight: [out, in] contiguous ([2 * out, in] for "swiglu", the gate's rows first);
    out: [1, out]. choice: BLOCK_OUT rows of W for a program, whose threads hold chunks of BLOCK_IN
    columns. Sums are float32.
    """
    inputs = x.shape[1]
    outputs, block = out.shape[1], choice["BLOCK_IN"]
    pdl = overlaps(x)
    _vector_kernel[(blocks(outputs, choice["BLOCK_OUT"]),)](
        x, weight, bias, norm.weight if norm else None, out,
        norm.eps if norm else 0.0, 1.0 if scale is None else scale,
        OUT=outputs, IN=inputs, NORM=norm is not None, ACTIVATION=activation,
        ADD=scale is not None, BLOCK_OUT=choice["BLOCK_OUT"], BLOCK_IN=block,
        CHUNKS=blocks(inputs, block), PDL=pdl, launch_pdl=pdl, num_warps=choice["num_warps"],
    )  # fmt: skip


@quick
@triton.jit
def _vector_kernel(
    x, weight, bias, norm_weight, out, eps, scale,
    OUT: tl.constexpr, IN: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    EVEN: tl.constexpr = OUT % BLOCK_OUT == 0 and IN % BLOCK_IN == 0
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_in = tl.arange(0, BLOCK_IN)
    inside = (o_out < OUT)[:, None]
    p_weight = weight + o_out[:, None].to(tl.int64) * IN + o_in[None, :]
    weights = _load_chunks(p_weight, o_in[None, :], inside, IN, BLOCK_IN, CHUNKS, EVEN)
    ups = weights
    if GATED:
        ups = _load_chunks(p_weight + OUT * IN, o_in[None, :], inside, IN, BLOCK_IN, CHUNKS, EVEN)
    norms = weights
    if norm_weight is not None:
        norms = _load_chunks(norm_weight + o_in, o_in, o_in < IN, IN, BLOCK_IN, CHUNKS, EVEN)
    wait_for_previous(PDL)
    b_y = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    b_up = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    squares = tl.zeros([BLOCK_IN], tl.float32)
    for i in tl.static_range(CHUNKS):
        b_x = tl.load(x + i * BLOCK_IN + o_in, mask=o_in < IN - i * BLOCK_IN, other=0.0)
        b_x = b_x.to(tl.float32)
        if NORM:
            squares += b_x * b_x
        if norm_weight is not None:
            b_x *= norms[i].to(tl.float32)
        b_y += weights[i].to(tl.float32) * b_x[None, :]
        if GATED:
            b_up += ups[i].to(tl.float32) * b_x[None, :]
    y = tl.sum(b_y, axis=1)
    up = tl.sum(b_up, axis=1)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / IN + eps)
        y *= inverse
        up *= inverse
    y = _with_bias_and_activation(y, up, bias, o_out, OUT, ACTIVATION)
    if ADD:
        y = tl.load(out + o_out, mask=o_out < OUT, other=0.0).to(tl.float32) + scale * y
    tl.store(out + o_out, y.to(out.dtype.element_ty), mask=o_out < OUT)


@triton.jit
def _load_chunks(
    pointers, o_in, inside, IN: tl.constexpr, BLOCK_IN: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """All chunks of columns, asked for before any is used."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        # Weights are read once a step and are larger than the cache: let them not drive out others.
        if EVEN:
            chunk = tl.load(pointers + i * BLOCK_IN, eviction_policy="evict_first")
        else:
            here = inside & (o_in < IN - i * BLOCK_IN)
            chunk = tl.load(
                pointers + i * BLOCK_IN, mask=here, other=0.0, eviction_policy="evict_first"
            )
        chunks += (chunk,)  # type: ignore[assignment]
    return chunks


@triton.jit
def _with_bias_and_activation(y, up, bias, o_out, OUT: tl.constexpr, ACTIVATION: tl.constexpr):
    if bias is not None:
        y += tl.load(bias + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)
        if ACTIVATION == "swiglu":
            up += tl.load(bias + OUT + o_out, mask=o_out < OUT, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        y = silu(y) * up
    elif ACTIVATION == "relu2":
        y = relu2(y)
    return y
