"""Whole state slots copied onto others: checkpoints, and the states that prefix hits start from."""

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import use_triton
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks

_BLOCK_WORDS = 4096


def copy_slots(region: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """region[targets] = region[sources], all pairs in one launch.

    region: uint8 [slots, bytes], contiguous, bytes a multiple of 16 (one slot one span); sources,
    targets: [pairs] int32 or int64 on its device. No target may be another pair's source or target;
    a pair of equals changes nothing. Reads and writes pairs * bytes.
    """
    if not use_triton(region):
        region[targets.long()] = region[sources.long()]
        return
    words = region.view(torch.int64)
    count = words.shape[1]
    grid = (blocks(count, _BLOCK_WORDS), sources.shape[0])
    _copy_slots_kernel[grid](words, sources, targets, count, BLOCK=_BLOCK_WORDS, num_warps=8)


@quick
@triton.jit(do_not_specialize_on_alignment=["sources", "targets"])
def _copy_slots_kernel(words, sources, targets, count, BLOCK: tl.constexpr):
    pair = tl.program_id(1)
    source, target = tl.load(sources + pair).to(tl.int64), tl.load(targets + pair).to(tl.int64)
    if source != target:
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        span = tl.load(words + source * count + offsets, mask=offsets < count)
        tl.store(words + target * count + offsets, span, mask=offsets < count)
