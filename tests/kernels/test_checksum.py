"""Checksums of rows: the kernel gives the reference's numbers, and no damage goes unseen."""

import torch
from fresh_seed import fresh_seed
from hypothesis import given, strategies as st

from tasuki_kernels.backend import interpreted
from tasuki_kernels.checksum import row_checksums


def memory(rows: int, row_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(fresh_seed())
    return torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8, generator=generator)


def test_the_kernel_gives_the_numbers_of_the_reference():
    for row_bytes in (8, 16, 8184, 8192, 8200, 131072, 131080, 300 * 1024):
        rows = memory(4, row_bytes)
        chosen = [3, 0, 3, 2]
        with interpreted():
            assert row_checksums(rows, chosen) == row_checksums_in_numbers(rows, chosen)
        assert row_checksums(rows, chosen) == row_checksums_in_numbers(rows, chosen)


def row_checksums_in_numbers(memory: torch.Tensor, rows: list[int]) -> list[int]:
    """The definition once more, in Python's own numbers."""
    wrap = 2**64 - 1
    sums = []
    for row in rows:
        total = 0
        for place, word in enumerate(memory[row].view(torch.int64).tolist()):
            x = (word & wrap) ^ (place * 0x1E3779B97F4A7C15 & wrap)
            x = x * 0x3F51AFD7ED558CCD & wrap
            x ^= x >> 32
            x = x * 0x44CEB9FE1A85EC53 & wrap
            x ^= x >> 29
            total += x
        sums.append(total & wrap)
    return sums


@given(st.data())
def test_one_flipped_bit_and_two_exchanged_words_change_it(data):
    rows = memory(1, 4096)
    (before,) = row_checksums(rows, [0])
    at, bit = data.draw(st.integers(0, 4095)), data.draw(st.integers(0, 7))
    rows[0, at] ^= 1 << bit
    (flipped,) = row_checksums(rows, [0])
    assert flipped != before
    words = rows.view(torch.int64)
    i, j = data.draw(st.integers(0, 511)), data.draw(st.integers(0, 511))
    words[0, [i, j]] = words[0, [j, i]]
    assert (row_checksums(rows, [0])[0] == flipped) == bool(words[0, i] == words[0, j])
