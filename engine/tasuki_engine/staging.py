"""One step's parts as one array of int32: all that the device must be told, in one copy."""

import dataclasses
import struct
from array import array

import numpy as np
import numpy.typing as npt

from tasuki_engine.flights import Part
from tasuki_kernels.step_inputs import FIELDS, RECORD

_PADDING = (0,) * (RECORD - len(FIELDS))


@dataclasses.dataclass(frozen=True)
class Staged:
    """The array and what lies where in it.

    Records of the sequences come first (`tasuki_kernels.step_inputs`). logits_rows, sources and
    targets: slices of the array. logits_rows: token rows that go through the head, those that are
    sampled first. sampled_rows: of the tables, whose last tokens those are. sources, targets: state
    slots to copy after the step.
    """

    numbers: npt.NDArray[np.int32]
    num_tokens: int
    num_decodes: int
    sampling: list[Part]
    scored: list[Part]
    logits_rows: slice
    sampled_rows: slice
    sources: slice
    targets: slice

    @property
    def is_plain_decode(self) -> bool:
        """Every part is one token from which the next is sampled."""
        return self.num_decodes == self.num_tokens == len(self.sampling) and not self.scored


def stage(parts: list[Part]) -> Staged:
    """Packs a step; block numbers that the device's tables lack go along, and are booked."""
    base = len(parts) * RECORD
    extra = array("i")
    records: list[int] = []
    rows: list[int] = []
    scored_rows: list[int] = []
    sampling: list[Part] = []
    scored: list[Part] = []
    copies: list[tuple[int, int]] = []
    first = num_decodes = 0
    for part in parts:
        seq, start, length = part.sequence, part.start, part.num_tokens
        tokens_at = -1
        if start < len(seq.tokens):
            tokens_at = base + len(extra)
            extra += seq.tokens[start : start + length]
        full, window = seq.num_tabled, seq.num_tabled_window
        full_at, new_full = base + len(extra), len(seq.full) - full
        if new_full:
            extra.extend(seq.full[full:])
            seq.num_tabled = len(seq.full)
        window_at, new_window = base + len(extra), len(seq.window) - window
        if new_window:
            extra.extend(seq.window[window:])
            seq.num_tabled_window = len(seq.window)
        records += (
            *(seq.row, start, length, first, tokens_at, seq.slot, seq.num_shared),
            *(full, new_full, full_at, window, new_window, window_at),
            *_PADDING,
        )
        first += length
        num_decodes += length == 1
        if part.samples:
            sampling.append(part)
            rows.append(first - 1)
        if count := scored_rows_of(part):
            scored.append(part)
            scored_rows += range(first - length, first - length + count)
        copies += [(seq.slot, c.slot) for c in part.checkpoints if c.boundary == part.end]
    rows_at = base + len(extra)
    sampled_at = rows_at + len(rows) + len(scored_rows)
    sources_at = sampled_at + len(rows)
    targets_at = sources_at + len(copies)
    rows += scored_rows
    rows += [part.sequence.row for part in sampling]
    rows += [source for source, _ in copies]
    rows += [target for _, target in copies]
    numbers = bytearray(struct.pack(f"{base}i", *records))
    numbers += extra
    numbers += struct.pack(f"{len(rows)}i", *rows)
    return Staged(
        numbers=np.frombuffer(numbers, np.int32),
        num_tokens=first,
        num_decodes=num_decodes,
        sampling=sampling,
        scored=scored,
        logits_rows=slice(rows_at, sampled_at),
        sampled_rows=slice(sampled_at, sources_at),
        sources=slice(sources_at, targets_at),
        targets=slice(targets_at, targets_at + len(copies)),
    )


def scored_rows_of(part: Part) -> int:
    """How many of the part's rows predict a prompt token whose log-probabilities are wanted."""
    seq = part.sequence
    if seq.prompt_logprobs_sent or seq.request.hand_over:
        return 0
    last = min(part.end, len(seq.request.prompt_token_ids) - 1)
    return max(0, last - part.start)
