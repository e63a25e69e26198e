"""The input kernel, interpreted, equals its reference, and the reference plain Python.

What nobody should write stays as it was; many steps follow each other on the same tables.
"""

import random

import numpy as np
import pytest
import torch
from fresh_seed import fresh_seed

from tasuki_kernels import step_inputs
from tasuki_kernels.backend import interpreted
from tasuki_kernels.step_inputs import FIELDS, RECORD, Inputs, Tables

ROWS, BLOCKS, BLOCK_SIZE, TOKENS = 6, 40, 8, 200
POISON = -7


def tables_and_inputs(full: bool, window: bool) -> tuple[Tables, Inputs]:
    device = torch.device("cpu")
    tables = Tables.empty(ROWS, BLOCKS, full=full, window=window, device=device)
    inputs = Inputs.empty(TOKENS, ROWS, tables)
    for tensor in vars(inputs).values():
        if tensor is not None:
            tensor.fill_(POISON)
    return tables, inputs


class Batch:
    """Random sequences on rows of their own; `step` draws what each computes next."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.computed = dict.fromkeys(range(ROWS), 0)
        self.blocks: dict[str, dict[int, list[int]]] = {
            name: {row: [] for row in range(ROWS)} for name in ("full", "window")
        }

    def step(self, decodes: bool) -> tuple[np.ndarray, list[dict[str, int]], dict[int, list[int]]]:
        rng, records, extra = self.rng, [], []
        rows = rng.sample(range(ROWS), rng.randrange(1, ROWS + 1))
        base, first, tokens = len(rows) * RECORD, 0, {}
        for row in rows:
            start = self.computed[row]
            if start > BLOCKS * BLOCK_SIZE - 60:
                start = self.computed[row] = 0
                for by_row in self.blocks.values():
                    by_row[row] = []
            length = 1 if decodes else rng.choice([1, 7, 8, 30])
            tokens[row] = [rng.randrange(1000) for _ in range(length)]
            flying = length == 1 and rng.random() < 0.5
            record = {"row": row, "start": start, "length": length, "first": first}
            record |= {"tokens_at": -1 if flying else base + len(extra), "slot": rng.randrange(99)}
            record["shared"] = rng.choice([0, 0, start + length // 2])
            extra += [] if flying else tokens[row]
            for name in ("full", "window"):
                known = self.blocks[name][row]
                missing = -(-(start + length) // BLOCK_SIZE) - len(known)
                new = [rng.randrange(1, 5000) for _ in range(max(0, missing))]
                record |= {f"{name}_first": len(known), f"{name}_count": len(new)}
                record[f"{name}_at"] = base + len(extra)
                extra += new
                known += new
            self.computed[row] += length
            first += length
            records.append(record)
        padding = [0] * (RECORD - len(FIELDS))
        numbers = [n for record in records for n in [*(record[f] for f in FIELDS), *padding]]
        return np.array(numbers + extra, np.int32), records, tokens


@pytest.mark.parametrize(("full", "window"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("decodes", [True, False])
def test_kernel_and_reference_give_what_plain_python_gives(
    full: bool, window: bool, decodes: bool
) -> None:
    rng = random.Random(fresh_seed())
    batch = Batch(rng)
    pairs = [tables_and_inputs(full, window) for _ in range(2)]
    for _ in range(8):
        packed, records, tokens = batch.step(decodes)
        for record in records:
            if record["tokens_at"] < 0:
                for tables, _ in pairs:
                    tables.last_tokens[record["row"]] = tokens[record["row"]][0]
        padded = rng.randrange(len(records), ROWS + 1) if decodes else len(records)
        sizes = {"num_seqs": len(records), "padded": padded, "block_size": BLOCK_SIZE}
        step_inputs.expand(torch.from_numpy(packed), *pairs[0], **sizes)
        with interpreted():
            step_inputs.expand(torch.from_numpy(packed), *pairs[1], **sizes)
        for tables, inputs in pairs:
            check(tables, inputs, batch, records, tokens, padded)


def check(
    tables: Tables,
    inputs: Inputs,
    batch: Batch,
    records: list[dict[str, int]],
    tokens: dict[int, list[int]],
    padded: int,
) -> None:
    rest = padded - len(records)
    flat = [token for record in records for token in tokens[record["row"]]] + [0] * rest
    count = len(flat)
    assert inputs.token_ids[:count].tolist() == flat
    positions = [r["start"] + i for r in records for i in range(r["length"])] + [0] * rest
    assert inputs.positions[:count].tolist() == positions
    contexts = [r["start"] + r["length"] for r in records]
    assert inputs.context_lens[:padded].tolist() == contexts + [0] * rest
    assert inputs.state_slots[:padded].tolist() == [r["slot"] for r in records] + [0] * rest
    assert inputs.rows[:padded].tolist() == [r["row"] for r in records] + [ROWS] * rest
    starts = np.cumsum([0, *(r["length"] for r in records), *[1] * rest]).tolist()
    assert inputs.query_start[: padded + 1].tolist() == starts
    for name, by_row, in_step, slots in (
        ("full", tables.full, inputs.full_table, inputs.full_slots),
        ("window", tables.window, inputs.window_table, inputs.window_slots),
    ):
        if by_row is None:
            continue
        expected = []
        for i, record in enumerate(records):
            blocks = batch.blocks[name][record["row"]]
            assert by_row[record["row"], : len(blocks)].tolist() == blocks
            assert in_step[i, : len(blocks)].tolist() == blocks
            for position in range(record["start"], record["start"] + record["length"]):
                hidden = name == "full" and position < record["shared"]
                block = 0 if hidden else blocks[position // BLOCK_SIZE]
                expected.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        assert slots[:count].tolist() == expected + [0] * rest


def test_a_token_that_could_not_be_drawn_is_no_index() -> None:
    record = [0, 5, 1, 0, -1, 1, 0, 0, 1, RECORD, 0, 0, 0, 0, 0, 0]
    packed = torch.tensor([*record, 3], dtype=torch.int32)
    for mode in (False, True):
        tables, inputs = tables_and_inputs(full=True, window=False)
        tables.last_tokens[0] = -1
        if mode:
            with interpreted():
                step_inputs.expand(packed, tables, inputs, num_seqs=1, padded=1, block_size=8)
        else:
            step_inputs.expand(packed, tables, inputs, num_seqs=1, padded=1, block_size=8)
        assert inputs.token_ids[0] == 0
        assert inputs.token_ids[1] == POISON
