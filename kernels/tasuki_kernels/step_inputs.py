"""A step's inputs from one packed array: records of its sequences, expanded on the device.

The host sends one int32 array a step. It begins with a record of RECORD numbers per sequence; token
ids and block numbers lie behind the records, at offsets that the records name. From it, from the
block tables that stay on the device, and from the last token of each row that the host may not even
know yet, `expand` makes what the model reads.
"""

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl

from tasuki_kernels.backend import use_triton
from tasuki_kernels.launcher import quick

RECORD = 16
FIELDS = (
    "row",
    "start",
    "length",
    "first",
    "tokens_at",
    "slot",
    "shared",
    "full_first",
    "full_count",
    "full_at",
    "window_first",
    "window_count",
    "window_at",
)
"""Numbers of a record, in order; the rest is padding.

row: of the block tables. start, length: tokens in the caches before, and tokens in the step. first:
the step's tokens before. tokens_at: offset of its token ids; -1: its one token is the last of its
row. slot: of its state. shared: tokens whose full-attention blocks must not be written. *_first,
*_count, *_at: blocks to enter into its tables, from which on, how many, and where they stand.
"""
_ROW, _START, _LENGTH, _FIRST, _TOKENS_AT, _SLOT, _SHARED = range(7)
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Tables:
    """What stays on the device from step to step, by row.

    full, window: block tables [rows, blocks] int32, None where the model has no such layers.
    last_tokens: [rows + 1] int64; the last one is a place for what nobody reads.
    """

    full: torch.Tensor | None
    window: torch.Tensor | None
    last_tokens: torch.Tensor

    @classmethod
    def empty(
        cls, num_rows: int, num_blocks: int, *, full: bool, window: bool, device: torch.device
    ) -> "Tables":
        """Tables of zeros."""

        def table(wanted: bool) -> torch.Tensor | None:
            shape = (num_rows, num_blocks)
            return torch.zeros(shape, dtype=torch.int32, device=device) if wanted else None

        last = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        return cls(table(full), table(window), last)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What `expand` writes; places of one size for all steps, at addresses that never change.

    token_ids, positions, full_slots, window_slots: [tokens] int64. query_start: [seqs + 1] int32.
    context_lens: [seqs] int32. state_slots, rows: [seqs] int64. full_table, window_table: [seqs,
    blocks] int32, or None.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    full_slots: torch.Tensor
    window_slots: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    state_slots: torch.Tensor
    rows: torch.Tensor
    full_table: torch.Tensor | None
    window_table: torch.Tensor | None

    @classmethod
    def empty(cls, num_tokens: int, num_seqs: int, tables: Tables) -> "Inputs":
        """Room for steps of up to so many tokens and sequences."""
        device = tables.last_tokens.device

        def room(count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        def table(like: torch.Tensor | None) -> torch.Tensor | None:
            return None if like is None else like.new_zeros(num_seqs, like.shape[1])

        return cls(
            token_ids=room(num_tokens),
            positions=room(num_tokens),
            full_slots=room(num_tokens),
            window_slots=room(num_tokens),
            query_start=room(num_seqs + 1, torch.int32),
            context_lens=room(num_seqs, torch.int32),
            state_slots=room(num_seqs),
            rows=room(num_seqs),
            full_table=table(tables.full),
            window_table=table(tables.window),
        )


def expand(
    packed: torch.Tensor,
    tables: Tables,
    inputs: Inputs,
    *,
    num_seqs: int,
    padded: int,
    block_size: int,
) -> None:
    """Enters new blocks into `tables` and fills `inputs` for `padded` sequences.

    packed: int32, records first. Sequences from `num_seqs` to `padded` are padding of one token
    each, and come only where all others have one token, too: context 0, null block, null slot, the
    last row. Table entries past a sequence's context keep what they held; a table is copied up to
    there (on the CPU: up to the longest context). Reads and writes a few numbers per token and
    per block: its time is that of a launch.
    """
    if use_triton(packed):
        _launch(packed, tables, inputs, num_seqs, padded, block_size)
    else:
        _reference(packed, tables, inputs, num_seqs, padded, block_size)


def _reference(
    packed: torch.Tensor,
    tables: Tables,
    inputs: Inputs,
    num_seqs: int,
    padded: int,
    block_size: int,
) -> None:
    numbers = packed.numpy()
    records = numbers[: num_seqs * RECORD].reshape(num_seqs, RECORD)
    row, start, length, first, tokens_at, slot, shared = (records[:, i] for i in range(7))
    owner = np.repeat(np.arange(num_seqs), length)
    offset = np.arange(len(owner), dtype=np.int32) - first[owner]
    position = start[owner] + offset
    token_ids = numbers[tokens_at[owner] + offset].astype(np.int64)
    flying = tokens_at[owner] < 0
    if flying.any():
        token_ids[flying] = np.maximum(tables.last_tokens.numpy()[row[owner[flying]]], 0)
    num_tokens = len(owner) + padded - num_seqs
    _fill(inputs.token_ids, token_ids, num_tokens)
    _fill(inputs.positions, position, num_tokens)
    _fill(inputs.context_lens, start + length, padded)
    _fill(inputs.state_slots, slot, padded)
    _fill(inputs.rows, row, padded, rest=len(tables.last_tokens) - 1)
    query_start = inputs.query_start.numpy()
    query_start[0] = 0
    query_start[1 : num_seqs + 1] = first + length
    query_start[num_seqs + 1 : padded + 1] = np.arange(len(owner) + 1, num_tokens + 1)
    used = int(-(-(start + length).max(initial=0) // block_size))
    for by_row, in_step, slots, field, writable in (
        (tables.full, inputs.full_table, inputs.full_slots, 7, shared),
        (tables.window, inputs.window_table, inputs.window_slots, 10, np.zeros_like(shared)),
    ):
        if by_row is None or in_step is None:
            continue
        table = by_row.numpy()
        for record in records[records[:, field + 1] > 0]:
            begin, count, at = record[field : field + 3]
            table[record[_ROW], begin : begin + count] = numbers[at : at + count]
        in_step.numpy()[:num_seqs, :used] = table[row, :used]
        block = table[row[owner], position // block_size].astype(np.int64)
        block[position < writable[owner]] = 0
        _fill(slots, block * block_size + position % block_size, num_tokens)


def _fill(target: torch.Tensor, values: np.ndarray, size: int, rest: int = 0) -> None:
    array = target.numpy()
    array[: len(values)] = values
    array[len(values) : size] = rest


def _launch(
    packed: torch.Tensor,
    tables: Tables,
    inputs: Inputs,
    num_seqs: int,
    padded: int,
    block_size: int,
) -> None:
    table = tables.full if tables.full is not None else tables.window
    _expand_kernel[(padded,)](
        packed, tables.full, tables.window, tables.last_tokens,
        inputs.token_ids, inputs.positions, inputs.full_slots, inputs.window_slots,
        inputs.query_start, inputs.context_lens, inputs.state_slots, inputs.rows,
        inputs.full_table, inputs.window_table,
        num_seqs,
        NUM_BLOCKS=0 if table is None else table.shape[1],
        LAST_ROW=len(tables.last_tokens) - 1,
        BLOCK_SIZE=block_size, FULL=tables.full is not None, WINDOW=tables.window is not None,
        RECORD=RECORD, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["num_seqs"])
def _expand_kernel(
    packed, full_by_row, window_by_row, last_tokens,
    token_ids, positions, full_slots, window_slots,
    query_start, context_lens, state_slots, rows, full_table, window_table,
    num_seqs,
    NUM_BLOCKS: tl.constexpr, LAST_ROW: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FULL: tl.constexpr, WINDOW: tl.constexpr, RECORD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence, padding included."""
    i = tl.program_id(0)
    if i == 0:
        tl.store(query_start, 0)
    if i < num_seqs:
        record = packed + i * RECORD
        row, start = tl.load(record), tl.load(record + 1)
        length, first = tl.load(record + 2), tl.load(record + 3)
        tokens_at = tl.load(record + 4)
        end = start + length
        tl.store(query_start + i + 1, first + length)
        tl.store(context_lens + i, end)
        tl.store(state_slots + i, tl.load(record + 5).to(tl.int64))
        tl.store(rows + i, row.to(tl.int64))
        table = i.to(tl.int64) * NUM_BLOCKS
        by_row = row.to(tl.int64) * NUM_BLOCKS
        used = (end + BLOCK_SIZE - 1) // BLOCK_SIZE
        if FULL:
            _enter(packed, record + 7, full_by_row + by_row, full_table + table, used, BLOCK)
        if WINDOW:
            _enter(packed, record + 10, window_by_row + by_row, window_table + table, used, BLOCK)
        shared = tl.load(record + 6)
        # A row whose logits were no numbers has the token -1; what follows it is dropped.
        num_known = tl.where(tokens_at >= 0, length, 0)
        last = tl.maximum(tl.load(last_tokens + row), 0)
        for begin in range(0, length, BLOCK):
            offset = begin + tl.arange(0, BLOCK)
            inside = offset < length
            known = tl.load(packed + tokens_at + offset, mask=offset < num_known, other=0)
            token = tl.where(offset < num_known, known.to(tl.int64), last)
            position = start + offset
            at = first + offset
            tl.store(token_ids + at, token, mask=inside)
            tl.store(positions + at, position.to(tl.int64), mask=inside)
            if FULL:
                writes = inside & (position >= shared)
                _place(full_table + table, full_slots + at, position, writes, inside, BLOCK_SIZE)
            if WINDOW:
                _place(
                    window_table + table, window_slots + at, position, inside, inside, BLOCK_SIZE
                )
    else:
        zero = tl.zeros((), tl.int64)
        tl.store(query_start + i + 1, i + 1)
        tl.store(context_lens + i, 0)
        tl.store(state_slots + i, zero)
        tl.store(rows + i, zero + LAST_ROW)
        tl.store(token_ids + i, zero)
        tl.store(positions + i, zero)
        if FULL:
            tl.store(full_slots + i, zero)
        if WINDOW:
            tl.store(window_slots + i, zero)


@triton.jit
def _enter(packed, fields, by_row, in_step, used, BLOCK: tl.constexpr):
    """New blocks into the row's table, and the first `used` entries of that into the step's."""
    begin, count, at = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    for done in range(0, count, BLOCK):
        offset = done + tl.arange(0, BLOCK)
        block = tl.load(packed + at + offset, mask=offset < count)
        tl.store(by_row + begin + offset, block, mask=offset < count)
    tl.debug_barrier()
    for done in range(0, used, BLOCK):
        offset = done + tl.arange(0, BLOCK)
        block = tl.load(by_row + offset, mask=offset < used)
        tl.store(in_step + offset, block, mask=offset < used)
    tl.debug_barrier()


@triton.jit
def _place(table, slots, position, writes, inside, BLOCK_SIZE: tl.constexpr):
    """Where K and V of tokens go; those that must not be written go to the null block."""
    block = tl.load(table + position // BLOCK_SIZE, mask=writes, other=0).to(tl.int64)
    tl.store(slots, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
