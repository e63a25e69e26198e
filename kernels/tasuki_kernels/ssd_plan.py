"""How a step's prefill tokens are cut for the Triton kernels: once per step, for all layers."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

CHUNK = 64
"""Tokens of which the scan makes one set of matrix products."""
MIN_SEGMENT = 256
"""Tokens that one program scans at least, chunk after chunk, where its sequence has as many."""
_PROGRAMS = 256
"""Scanning programs that fill a card (132 multiprocessors, two each); more segments cost sums."""
CONV_BLOCK = 16
"""Tokens that one program of the convolution takes."""


@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """Tables on the device, int32. Rows count the prefill tokens, sequences the prefill sequences.

    slots, context_lens: [sequences]; one whose context is its length in this step starts from zero,
    and its slot may hold anything.

    bounds: [chunks + 1], the chunks' first rows. exports: [chunks], the slot that gets the state
    after a chunk as a checkpoint, or -1.
    segments: [segments, 5]: first chunk, end chunk, sequence, place among the carried states (-1:
    the only segment of its sequence, which starts from the slot itself), 1 for the last segment.
    summed: [sums], segments whose sum the next one needs. carried: [sequences cut in several, 3]:
    first place, number of places, sequence; num_carried places in all.
    conv_blocks: [blocks, 4]: first row, end row, the sequence's first row, sequence.
    conv_exports: [n, 4]: end row, the sequence's first row, sequence, slot: checkpoints' windows.
    lens: [sequences], tokens of each in this step.
    """

    slots: torch.Tensor
    context_lens: torch.Tensor
    bounds: torch.Tensor
    exports: torch.Tensor
    segments: torch.Tensor
    summed: torch.Tensor
    carried: torch.Tensor
    num_carried: int
    conv_blocks: torch.Tensor
    conv_exports: torch.Tensor
    lens: torch.Tensor


def plan_prefill(
    query_lens: Sequence[int],
    checkpoints: Sequence[tuple[int, int, int]],
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    heads: int,
) -> PrefillPlan:
    """Cut sequences into chunks of at most CHUNK tokens, also at each checkpoint.

    query_lens: tokens of each sequence, at least one. checkpoints: (sequence, tokens, slot), with
    fewer tokens than the sequence has. slots, context_lens: [sequences], on the device. heads: of
    the state space; with the tokens they decide how long segments are. One copy to the device,
    which the host does not wait for.
    """
    marks: list[dict[int, int]] = [{} for _ in query_lens]
    for seq, tokens, slot in checkpoints:
        marks[seq][tokens] = slot
    starts = np.cumsum([0, *query_lens]).tolist()
    cuts = [_cuts(length, marks[seq]) for seq, length in enumerate(query_lens)]
    segments, summed, carried = _segment_tables(cuts, heads)
    bounds = [0, *(start + cut for start, ends in zip(starts, cuts, strict=False) for cut in ends)]
    conv_exports = [[starts[seq] + n, starts[seq], seq, slot] for seq, n, slot in checkpoints]
    tables = {
        "bounds": np.array(bounds),
        "exports": np.array([marks[seq].get(cut, -1) for seq, e in enumerate(cuts) for cut in e]),
        "segments": np.array(segments),
        "summed": np.array(summed),
        "carried": np.array(carried).reshape(-1, 3),
        "conv_blocks": _conv_blocks(np.array(query_lens)),
        "conv_exports": np.array(conv_exports).reshape(-1, 4),
        "lens": np.array(query_lens),
    }
    on_device = dict(zip(tables, _to_device(list(tables.values()), slots.device), strict=True))
    num_carried = sum(count for _, count, _ in carried)
    return PrefillPlan(slots, context_lens, num_carried=num_carried, **on_device)


def _conv_blocks(lens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`conv_blocks` of the plan."""
    counts = -(-lens // CONV_BLOCK)
    ends = lens.cumsum()
    seq = np.repeat(np.arange(len(lens)), counts)
    number = np.arange(len(seq)) - (counts.cumsum() - counts)[seq]
    start = (ends - lens)[seq]
    row = start + number * CONV_BLOCK
    return np.stack((row, np.minimum(row + CONV_BLOCK, ends[seq]), start, seq), axis=1)


def _segment_tables(
    cuts: list[list[int]], heads: int
) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """`segments`, `summed` and `carried` of the plan."""
    tokens = max(sum(ends[-1] for ends in cuts) * heads // _PROGRAMS, MIN_SEGMENT)
    segments, summed, carried = list[list[int]](), list[int](), list[list[int]]()
    first = place = 0
    for seq, ends in enumerate(cuts):
        parts = _segments(ends, tokens)
        is_cut = len(parts) > 1
        if is_cut:
            summed += range(len(segments), len(segments) + len(parts) - 1)
            carried.append([place, len(parts), seq])
        for number, (begin, end) in enumerate(parts):
            at = place + number if is_cut else -1
            is_last = number == len(parts) - 1
            segments.append([first + begin, first + end, seq, at, int(is_last)])
        first += len(ends)
        place += len(parts) if is_cut else 0
    return segments, summed, carried


def _cuts(length: int, marks: dict[int, int]) -> list[int]:
    """Ends of the chunks of one sequence: the longest, but none across a mark."""
    cuts: list[int] = []
    start = 0
    for mark in sorted({*marks, length}):
        cuts += range(start + CHUNK, mark, CHUNK)
        cuts.append(mark)
        start = mark
    return cuts


def _segments(cuts: list[int], tokens: int) -> list[tuple[int, int]]:
    """Chunk ranges of about so many tokens; an only one where the sequence is not much longer."""
    count = round(cuts[-1] / tokens)
    if count <= 1:
        return [(0, len(cuts))]
    ends = np.searchsorted(cuts, np.arange(1, count + 1) * (cuts[-1] / count)) + 1
    ends[-1] = len(cuts)
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _to_device(arrays: list[npt.NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as views of one int32 tensor that is copied once, each aligned to 16 bytes."""
    starts = np.cumsum([0, *(-(-array.size // 4) * 4 for array in arrays)]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    view = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        view[start : start + array.size] = array.ravel()
    moved = packed.to(device, non_blocking=True)
    return [
        moved[start : start + array.size].view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
