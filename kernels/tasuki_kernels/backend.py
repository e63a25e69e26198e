"""Where an operation runs: Triton kernels on CUDA, torch references on the CPU.

Programmatic dependent launch, on cards that have it, starts a kernel before the one in front of it
has ended, so that what the two do not share overlaps. All kernels of a decode step follow one rule:

    kernel[grid](..., PDL=overlaps(x), launch_pdl=overlaps(x))

    let_next_start(PDL)     once its programs are under way
    ... loads of weights, and of what earlier steps wrote ...
    wait_for_previous(PDL)  always, before the first access to what another kernel of this step
                            writes, and before the first write

Earlier steps have ended: each step begins with kernels of torch's, which never start early.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_interpreting = contextvars.ContextVar("interpreting", default=False)


def use_triton(tensor: torch.Tensor) -> bool:
    """True for CUDA tensors, and inside `interpreted()` for all."""
    return tensor.is_cuda or _interpreting.get()


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether kernels on the tensor's device may start early: CUDA from Hopper on."""
    return tensor.is_cuda and _capability(tensor.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may start once all programs of this one came here; it still waits."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernels before have ended and what they wrote is visible."""
    if PDL:
        gdc_wait()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors too, in Triton's interpreter: for tests.

    NumPy, in which it computes, does not warn of NaN and infinity meanwhile: no card does, and
    what a kernel reads and then masks may be anything.

    Raises:
        RuntimeError: when TRITON_INTERPRET=1 was not set before the kernels were imported.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Set TRITON_INTERPRET=1 before the first import of a kernel.")
    token = _interpreting.set(True)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        _interpreting.reset(token)
