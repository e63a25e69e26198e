"""Paged attention against dense attention in float64, one query at a time."""

import random

import fresh_seed
import pools
import pytest
import torch

from tasuki_kernels import attention, kv_write

BLOCK_SIZE = 16
LAYERS = 3


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """The last queries of a context: query [t, heads, d]; key, value [context, kv_heads, d]."""
    context, (tokens, heads, _) = len(key), query.shape
    group = heads // key.shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for t in range(tokens):
        last = context - tokens + t
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(heads):
            keys = key[first : last + 1, h // group].double()
            scores = torch.softmax(keys @ query[t, h].double() * scale, dim=0)
            out[t, h] = scores @ value[first : last + 1, h // group].double()
    return out


def run(draw, query_lens, context_lens, heads, kv_heads, head_dim, window, layer=1):
    """Both answers for a random case: [tokens, heads, head_dim]."""
    num_decodes = sum(length == 1 for length in query_lens)
    widths = [-(-context // BLOCK_SIZE) for context in context_lens]
    free = draw.sample(range(1, sum(widths) + 5), sum(widths))
    cache = pools.nan_pool(sum(widths) + 5, LAYERS, 2, kv_heads, BLOCK_SIZE, head_dim)
    table = torch.zeros(len(query_lens), max(widths), dtype=torch.int32)
    keys, values, places = [], [], []
    for seq, context in enumerate(context_lens):
        blocks = [free.pop() for _ in range(widths[seq])]
        keys.append(torch.randn(context, kv_heads, head_dim))
        values.append(torch.randn(context, kv_heads, head_dim))
        slots = [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context)]
        write(cache, layer, slots, keys[seq], values[seq])
        places.append(slots)
        behind = 0
        if window is not None:
            behind = max(0, context - query_lens[seq] - window + 1) // BLOCK_SIZE
        table[seq, behind : len(blocks)] = torch.tensor(blocks[behind:], dtype=torch.int32)
    query = torch.randn(sum(query_lens), heads, head_dim)
    plan = attention.plan(
        cache, table, query_lens, context_lens, num_decodes, window, heads // kv_heads
    )
    scale = draw.uniform(0.05, 0.5)
    actual = attention.paged_attention(query, plan, layer, scale).view_as(query)
    parts = query.split(query_lens)
    expected = [dense(*case, scale, window) for case in zip(parts, keys, values, strict=True)]
    return actual, torch.cat(expected)


def write(cache, layer, slots, key, value):
    """Token by token, as decode steps would."""
    for position, slot in enumerate(slots):
        rows = kv_write.write_rows(torch.tensor([slot]), BLOCK_SIZE)
        kv_write.clear_new_blocks(cache, rows)
        kv = torch.stack((key[position], value[position]))[None]
        kv_write.write_kv(cache, layer, rows, kv)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 33])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 20), (5, 1, 16)])
def test_ragged_batches_equal_dense_attention(window, heads, kv_heads, head_dim):
    seed = fresh_seed.fresh_seed()
    draw = random.Random(seed)
    torch.manual_seed(seed)
    contexts = [1, 2, 16, 17, draw.randrange(1, 120), 130, 300]
    query_lens = [1] * len(contexts)
    for length, before in [(2, 0), (16, 0), (17, 31), (40, draw.randrange(60)), (3, 64)]:
        query_lens.append(length)
        contexts.append(before + length)
    actual, expected = run(draw, query_lens, contexts, heads, kv_heads, head_dim, window)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 33])
def test_long_chunks_are_attended_in_pieces_of_bounded_memory(window, monkeypatch):
    seed = fresh_seed.fresh_seed()
    torch.manual_seed(seed)
    monkeypatch.setattr(attention, "MAX_BIAS_ELEMENTS", 2 * 150 * 10)
    cases = [1, 60, 40], [20, 150, 40]
    actual, expected = run(random.Random(seed), *cases, 4, 2, 16, window)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    cache = pools.nan_pool(12, 1, 2, 2, BLOCK_SIZE, 8)
    table = torch.arange(1, 11)[None]
    plan = attention.plan(cache, table, [60], [150], 0, window, 2)
    assert len(plan.parts) > 1
    aligned = 2 * 2 * BLOCK_SIZE * 60
    assert all(p.bias.numel() <= attention.MAX_BIAS_ELEMENTS + aligned for p in plan.parts)


@pytest.mark.parametrize("case", [([1], [1]), ([1], [48]), ([32], [32]), ([1, 1], [15, 64])])
def test_single_shapes_equal_dense_attention(case):
    seed = fresh_seed.fresh_seed()
    torch.manual_seed(seed)
    actual, expected = run(random.Random(seed), *case, 4, 2, 16, None)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_block_given_out_again_hides_what_its_last_owner_left():
    cache = pools.nan_pool(4, 1, 2, 1, BLOCK_SIZE, 8)
    rows = kv_write.write_rows(torch.tensor([2 * BLOCK_SIZE]), BLOCK_SIZE)
    kv_write.clear_new_blocks(cache, rows)
    kv_write.write_kv(cache, 0, rows, torch.ones(1, 2, 1, 8))
    plan = attention.plan(cache, torch.tensor([[2]]), [1], [1], 1, None, 1)
    assert attention.paged_attention(torch.ones(1, 1, 8), plan, 0, 1.0).tolist() == [[1.0] * 8]


def test_writing_touches_only_the_tokens_places():
    torch.manual_seed(fresh_seed.fresh_seed())
    cache = pools.nan_pool(6, LAYERS, 2, 2, BLOCK_SIZE, 8)
    slots = [5 * BLOCK_SIZE + 15, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1]
    kv = torch.randn(3, 2, 2, 8)
    rows = kv_write.write_rows(torch.tensor(slots), BLOCK_SIZE)
    kv_write.write_kv(cache, 2, rows, kv)
    for token, slot in enumerate(slots):
        written = cache[slot // BLOCK_SIZE, 2, :, :, slot % BLOCK_SIZE]
        assert torch.equal(written, kv[token])
    assert int((~cache.isnan()).sum()) == kv.numel()
