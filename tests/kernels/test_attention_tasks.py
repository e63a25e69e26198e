"""How contexts are cut into tasks: every query meets each of its keys once, at any lengths."""

import collections
import itertools

import torch
from hypothesis import given, settings, strategies as st

from tasuki_kernels import attention_decode, attention_prefill
from tasuki_kernels.attention_prefill import Chunk, Tile
from tasuki_kernels.backend import interpreted

lengths = st.tuples(st.integers(1, 3000), st.integers(0, 40_000))


@given(
    st.lists(lengths, min_size=1, max_size=4),
    st.none() | st.integers(1, 5000),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([1, 3, 64]),
)
@settings(max_examples=60)
def test_tasks_of_chunks_cover_every_key_of_every_query_once(cases, window, kv_heads, queries):
    tile, chunks, row = Tile(128, 64, 4, 3), [], 0
    for seq, (length, before) in enumerate(cases):
        chunks.append(Chunk(seq, row, length, before + length))
        row += length
    tasks, merges = attention_prefill._cut(chunks, tile, kv_heads, window, queries)

    runs = collections.defaultdict(list)
    for seq, first, count, position, begin, end, part in tasks:
        runs[first].append((part, begin, end, count, seq, position))
    covered = []
    for first, parts in runs.items():
        parts.sort()
        _, _, _, count, seq, position = parts[0]
        chunk = chunks[seq]
        assert position == chunk.context - chunk.queries + first - chunk.row
        seen_from = max(0, position - window + 1) if window else 0
        assert seen_from - tile.keys < parts[0][1] <= seen_from
        assert parts[-1][2] == position + count
        assert all(a[2] == b[1] for a, b in itertools.pairwise(parts))
        assert all(begin % tile.keys == 0 and begin < end for _, begin, end, *_ in parts)
        covered += range(first, first + count)
        named = [part for part, *_ in parts]
        if len(parts) == 1:
            assert named == [-1]
        else:
            assert (first, count, named[0], len(parts)) in merges
            assert named == list(range(named[0], named[0] + len(parts)))
    assert sorted(covered) == list(range(row))
    spans = [begin - end for *_, begin, end, _ in tasks]
    assert spans == sorted(spans), "longest first"


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=12), st.none() | st.integers(1, 9000))
@settings(max_examples=5)
def test_tasks_of_decodes_cover_every_cached_key_once(contexts, window):
    cache = torch.zeros(1, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    tile = attention_decode._tile(cache)
    with interpreted():
        plan = attention_decode.plan(
            cache,
            torch.zeros(len(contexts), 1, dtype=torch.int32),
            torch.zeros(len(contexts), dtype=torch.int64),
            torch.tensor(contexts, dtype=torch.int32),
            len(contexts),
            window,
            group=2,
        )
    records = [record[:6] for record in plan.tasks.tolist() if record[0] >= 0]
    for seq, context in enumerate(contexts):
        own = [record for record in records if record[0] == seq]
        assert [place for _, place, *_ in own] == list(range(len(own)))
        assert all((number, length) == (len(own), context) for _, _, number, _, _, length in own)
        assert len(own) <= attention_decode.MAX_PARTS
        seen_from = max(0, context - window) if window else 0
        assert seen_from - tile < own[0][3] <= seen_from
        assert own[-1][4] == max(context - 1, 0) or own[-1][3] >= max(context - 1, 0)
        for left, right in itertools.pairwise(own):
            assert left[4] == right[3]
            assert left[3] < left[4]


@given(st.lists(st.tuples(st.sampled_from([1, 40, 1024, 1500, 2048]), st.sampled_from([0, 512]))))
def test_heads_of_prompts_and_the_rest_are_all_tokens_once(cases):
    chunks, row = [], 5
    for seq, (length, before) in enumerate(cases):
        chunks.append(Chunk(seq, row, length, before + length))
        row += length
    dense, rest = attention_prefill._without_dense(chunks)
    covered = [i for part in dense for i in range(part.row, part.end)]
    covered += [i for chunk in rest for i in range(chunk.row, chunk.row + chunk.queries)]
    assert sorted(covered) == list(range(5, row))
    starts = {chunk.row for chunk in chunks if chunk.context == chunk.queries}
    for part in dense:
        assert part.length % attention_prefill.DENSE_UNIT == 0
        assert {part.row + i * part.length for i in range(part.prompts)} <= starts
    for chunk in rest:
        whole = chunks[chunk.seq]
        assert chunk.row + chunk.queries == whole.row + whole.queries
        assert chunk.context == whole.context
