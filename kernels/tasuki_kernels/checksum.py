"""Checksums of whole rows of bytes, for what is handed over between devices.

A row is read as 64-bit words w_i. Each is mixed by a bijection that depends on its place, and the
results are added modulo 2**64, so that any number of programs may share a row:

    x = w_i ^ (i * PLACE);  x = (x * FIRST) ^ (x * FIRST >> 32);  x = (x * SECOND) ^ (... >> 29)

One wrong word always changes the sum; any other damage that is not made on purpose goes unseen with
a probability of about 2**-64. The mix is that of splitmix64 (Steele, Lea & Flood 2014) with other
odd multipliers, which fit in a signed word.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import use_triton
from tasuki_kernels.launcher import quick
from tasuki_kernels.sizes import blocks

_PLACE, _FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x3F51AFD7ED558CCD, 0x44CEB9FE1A85EC53
_BLOCK = 1024
_PIECE_WORDS = 16 * _BLOCK
"""128 KiB for one program: a block of a small model is one piece, a state slot is hundreds."""


def row_checksums(memory: torch.Tensor, rows: Sequence[int]) -> list[int]:
    """The checksum of each of `rows`, an unsigned 64-bit number.

    memory: uint8 [count, row bytes], contiguous, row bytes a multiple of 8. Reads each row once:
    about 20 integer operations for 8 bytes, which an H200 does faster than it reads them.
    """
    words = memory.view(torch.int64)
    index = torch.tensor(rows, dtype=torch.int64, pin_memory=memory.is_cuda)
    index = index.to(memory.device, non_blocking=True)
    if use_triton(memory):
        sums = _launch(words, index)
    else:
        sums = torch.stack([_mixed(words[row]).sum() for row in rows])
    return [value & (2**64 - 1) for value in sums.tolist()]


def _mixed(words: torch.Tensor) -> torch.Tensor:
    place = torch.arange(len(words), device=words.device)
    x = (words ^ (place * _PLACE)).mul_(_FIRST)
    x ^= (x >> 32) & (2**32 - 1)
    x.mul_(_SECOND)
    x ^= (x >> 29) & (2**35 - 1)
    return x


def _launch(words: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    pieces = blocks(words.shape[1], _PIECE_WORDS)
    sums = torch.empty(len(rows), pieces, dtype=torch.int64, device=words.device)
    _piece_kernel[(len(rows), pieces)](
        words, rows, sums, words.shape[1], PIECE=_PIECE_WORDS, BLOCK=_BLOCK, num_warps=4
    )
    return sums.sum(1)


@quick
@triton.jit
def _piece_kernel(words, rows, sums, row_words, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    piece = tl.program_id(1)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    end = tl.minimum((piece + 1) * PIECE, row_words)
    for start in range(piece * PIECE, end, BLOCK):
        place = (start + tl.arange(0, BLOCK)).to(tl.int64)
        here = place < row_words
        x = tl.load(words + row * row_words + place, mask=here, other=0)
        x = (x ^ (place * 0x1E3779B97F4A7C15)) * 0x3F51AFD7ED558CCD
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
        x = x * 0x44CEB9FE1A85EC53
        x = x ^ ((x >> 29) & 0x7FFFFFFFF)
        total += tl.where(here, x, 0)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + piece, tl.sum(total, axis=0))
