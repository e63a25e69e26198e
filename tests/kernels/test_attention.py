"""Paged attention against dense attention in float64, one query at a time: torch and Triton."""

import contextlib
import random

import fresh_seed
import paged_attention
import pools
import pytest
import torch

from tasuki_kernels import attention, attention_decode, attention_reference, kv_write
from tasuki_kernels.backend import interpreted

BLOCK_SIZE = paged_attention.BLOCK_SIZE
RAGGED = [(2, 0), (16, 0), (17, 31), (40, 23), (3, 64)]


def draw_from_fresh_seed() -> random.Random:
    seed = fresh_seed.fresh_seed()
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds for a program, even for one that has nothing to do."""
    monkeypatch.setattr(attention_decode, "TARGET_PROGRAMS", 8)


def ragged(draw: random.Random) -> tuple[list[int], list[int]]:
    """Query and context lengths: decodes of every alignment, then chunks with and without past."""
    contexts = [1, 2, 16, 17, draw.randrange(1, 120), 300]
    query_lens = [1] * len(contexts)
    for length, before in RAGGED:
        query_lens.append(length)
        contexts.append(before + length)
    return query_lens, contexts


def check(case: paged_attention.Case, scale: float, **options: object) -> None:
    actual = case.run(scale, **options)
    expected = case.expected(scale, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 33])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 20), (5, 1, 16)])
def test_ragged_batches_equal_dense_attention(window, heads, kv_heads, head_dim):
    draw = draw_from_fresh_seed()
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    check(paged_attention.make(draw, *ragged(draw), **shape, window=window, clean=True), 0.3)


@pytest.mark.parametrize("case", [([1], [1]), ([1], [48]), ([32], [32]), ([1, 1], [15, 64])])
def test_single_shapes_equal_dense_attention(case):
    draw = draw_from_fresh_seed()
    check(paged_attention.make(draw, *case, heads=4, kv_heads=2, head_dim=16, clean=True), 0.3)


@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"sinks": True}, {"softcap": 5.0, "sinks": 1}]
)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_softcap_and_sinks_equal_dense_attention(options, path):
    draw = draw_from_fresh_seed()
    shape = {"heads": 6, "kv_heads": 2, "head_dim": 16}
    case = paged_attention.make(draw, *ragged(draw), **shape, clean=path == "torch", window=33)
    if "sinks" in options:
        options = options | {"sinks": torch.randn(6)}
    if path == "torch":
        check(case, 0.8, **options)
    else:
        with interpreted():
            check(case, 0.8, **options)


@pytest.mark.parametrize("path", ["torch", "triton"])
@pytest.mark.parametrize(("with_norm", "rotary_dim"), [(True, 24), (False, 10), (True, 0)])
def test_norm_rope_and_writes_equal_float64(path, with_norm, rotary_dim):
    draw = draw_from_fresh_seed()
    shape = {"heads": 6, "kv_heads": 2, "head_dim": 24}
    case = paged_attention.make(
        draw, *ragged(draw), **shape, with_norm=with_norm, rotary_dim=rotary_dim,
        clean=path == "torch",
    )  # fmt: skip
    if path == "triton":
        with interpreted():
            check(case, 0.3)
        assert case.wrong_places() == 0
    else:
        if case.rope is not None:
            rows = case.rope.positions
            rope = case.rope
            case.rope = type(rope)(rope.cos[rows], rope.sin[rows], None)
        check(case, 0.3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"), [(6, 2, 20, 1), (5, 1, 16, 33), (3, 3, 64, None)]
)
def test_kernels_on_ragged_batches_equal_dense_attention(heads, kv_heads, head_dim, window):
    draw = draw_from_fresh_seed()
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    case = paged_attention.make(draw, *ragged(draw), **shape, window=window)
    with interpreted():
        check(case, 0.3)
    assert case.wrong_places() == 0


def test_padded_rows_become_zero_and_write_to_the_null_block_alone():
    draw = draw_from_fresh_seed()
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    case = paged_attention.make(draw, [1] * 5, [40, 0, 1, 0, 17], **shape, rotary_dim=16)
    with interpreted():
        check(case, 0.3)
    assert case.wrong_places() == 0


def test_long_contexts_among_short_ones_are_cut_evenly_and_merged(monkeypatch):
    monkeypatch.setattr(attention_decode, "TARGET_PROGRAMS", 32)
    draw = draw_from_fresh_seed()
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16}
    case = paged_attention.make(draw, [1, 1, 1, 3], [900, 20, 400, 1000], **shape)
    with interpreted():
        check(case, 0.3)
        plan = attention.plan(
            case.cache, case.block_table, case.slot_mapping,
            torch.tensor(case.context_lens, dtype=torch.int32), case.query_lens,
            case.context_lens, 3, None, 2,
        )  # fmt: skip
    records = plan.decode.tasks
    live = records[records[:, 0] >= 0]
    assert torch.bincount(live[:, 0]).tolist() == live[live[:, 1] == 0][:, 2].tolist()
    assert int((live[:, 4] - live[:, 3]).max()) <= 128
    assert len(plan.prefill.merges) == 1


def test_long_chunks_are_attended_in_pieces_of_bounded_memory(monkeypatch):
    draw = draw_from_fresh_seed()
    monkeypatch.setattr(attention_reference, "MAX_BIAS_ELEMENTS", 2 * 150 * 10)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    for window in (None, 33):
        case = paged_attention.make(
            draw, [1, 60, 40], [20, 150, 40], **shape, window=window, clean=True
        )
        check(case, 0.3)
    cache = pools.nan_pool(12, 1, 2, 2, BLOCK_SIZE, 8)
    table = torch.arange(1, 11)[None]
    slots = torch.arange(60) + 106
    plan = attention_reference.plan(cache, table, slots, [60], [150], 0, window, 2)
    assert len(plan.parts) > 1
    aligned = 2 * 2 * BLOCK_SIZE * 60
    bound = attention_reference.MAX_BIAS_ELEMENTS + aligned
    assert all(part.bias.numel() <= bound for part in plan.parts)


def test_a_block_given_out_again_hides_what_its_last_owner_left():
    cache = pools.nan_pool(4, 1, 2, 1, BLOCK_SIZE, 8)
    slots = torch.tensor([2 * BLOCK_SIZE])
    for context in (contextlib.nullcontext(), interpreted()):
        cache.fill_(torch.nan)
        with context:
            plan = attention.plan(
                cache, torch.tensor([[2]], dtype=torch.int32), slots,
                torch.tensor([1], dtype=torch.int32), [1], [1], 1, None, 1,
            )  # fmt: skip
            assert attention.attend(torch.ones(1, 3, 8), plan, 0, 1.0).tolist() == [[1.0] * 8]


def test_writing_touches_only_the_tokens_places():
    torch.manual_seed(fresh_seed.fresh_seed())
    cache = pools.nan_pool(6, 3, 2, 2, BLOCK_SIZE, 8)
    slots = [5 * BLOCK_SIZE + 15, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1]
    kv = torch.randn(3, 2, 2, 8)
    rows = kv_write.write_rows(torch.tensor(slots), BLOCK_SIZE)
    kv_write.write_kv(cache, 2, rows, kv)
    for token, slot in enumerate(slots):
        written = cache[slot // BLOCK_SIZE, 2, :, :, slot % BLOCK_SIZE]
        assert torch.equal(written, kv[token])
    assert int((~cache.isnan()).sum()) == kv.numel()
