"""Every family computes what transformers computes, however the tokens are cut into steps.

The caches start as NaN and blocks and slots lie in random order, so reading what was not written
shows. Not covered here: scheduling, prefix hits and hand-overs (tests/engine).
"""

import functools
import random
from pathlib import Path

import fresh_seed
import paged
import pytest
import tiny_models
import torch

from tasuki_engine import models
from tasuki_engine.config import EngineConfig

TOLERANCE = 1e-4
HYBRIDS = [name for name in tiny_models.FAMILIES if "granite" in name or "nemotron" in name]


@pytest.fixture(scope="module")
def seed() -> int:
    return fresh_seed.fresh_seed()


@pytest.fixture(scope="module")
def load(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def cached(family: str):
        path = tiny_models.make(family, folder, seed)
        return path, models.load(EngineConfig(model=str(path)))

    return cached


def prompt(draw: random.Random, folder: Path, length: int) -> list[int]:
    """Random tokens on which the reference is not at a tie between experts, and rounds little."""
    while True:
        tokens = [draw.randrange(tiny_models.VOCAB_SIZE) for _ in range(length)]
        certain = tiny_models.routing_margin(folder, tokens) > 2e-5
        if certain and tiny_models.reference_rounding(folder, tokens) < 0.4 * TOLERANCE:
            return tokens


def run(harness: paged.PagedModel, prompts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """Log-probabilities of all prompts, computed together, `chunk` tokens of each at a time."""
    sequences = [harness.new_sequence() for _ in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk):
        live = [i for i, tokens in enumerate(prompts) if start < len(tokens)]
        chunks = [paged.Chunk(sequences[i], prompts[i][start : start + chunk]) for i in live]
        for i, part in zip(live, harness.logprobs(chunks), strict=True):
            parts[i].append(part)
    return [torch.cat(part) for part in parts]


def assert_close(actual: torch.Tensor, folder: Path, tokens: list[int], start: int = 0) -> None:
    """`actual` is of the positions from `start` on."""
    expected = tiny_models.reference_logprobs(folder, tokens)[start:]
    assert (actual.dtype, actual.shape) == (torch.float32, expected.shape)
    off = (actual - expected).abs().amax(dim=-1)
    bound = torch.full_like(off, TOLERANCE)
    if off.max() > TOLERANCE:
        bound = bound.maximum(4 * tiny_models.reference_spread(folder, tokens)[start:])
    assert (off <= bound).all(), f"off by {off.max():.1e}"


@pytest.mark.parametrize("chunk", [1, 7, 64, 256, 700])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_ragged_prompts_in_any_chunks_equal_transformers(load, seed, family, chunk):
    folder, model = load(family)
    draw = random.Random(seed + chunk)
    lengths = [1, 2, 700, 16, 64, 65, draw.randrange(3, 700), draw.randrange(3, 700)]
    prompts = [prompt(draw, folder, length) for length in lengths]
    results = run(paged.PagedModel(model, seed), prompts, chunk)
    for result, tokens in zip(results, prompts, strict=True):
        assert_close(result, folder, tokens)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_decodes_beside_prefills_equal_transformers(load, seed, family):
    folder, model = load(family)
    draw = random.Random(seed)
    first, second, third = (prompt(draw, folder, length) for length in (120, 90, 1))
    harness = paged.PagedModel(model, seed)
    a, b, c = (harness.new_sequence() for _ in range(3))
    start = harness.logprobs([paged.Chunk(a, first[:100])])[0]
    steps = [start]
    for i in range(100, 120):
        chunks = [paged.Chunk(a, first[i : i + 1])]
        if i == 105:
            chunks.append(paged.Chunk(b, second))
        if i == 110:
            chunks.append(paged.Chunk(c, third))
        results = harness.logprobs(chunks)
        steps.append(results[0])
        if i == 105:
            assert_close(results[1], folder, second)
        if i == 110:
            assert_close(results[1], folder, third)
    assert_close(torch.cat(steps), folder, first)


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_checkpoint_of_a_chunk_resumes_exactly_there(load, seed, family):
    folder, model = load(family)
    draw = random.Random(seed)
    tokens = prompt(draw, folder, 260)
    harness = paged.PagedModel(model, seed)
    sequence = harness.new_sequence()
    marks = {16: harness.new_slot(), 64: harness.new_slot(), 80: harness.new_slot()}
    later = {144: harness.new_slot(), 160: harness.new_slot()}
    harness.logprobs([paged.Chunk(sequence, tokens[:90], list(marks.items()))])
    chunk = paged.Chunk(sequence, tokens[90:160], [(n - 90, slot) for n, slot in later.items()])
    other = paged.Chunk(harness.new_sequence(), tokens[:33])
    harness.logprobs([other, chunk])
    for depth, slot in (marks | later).items():
        resumed = harness.fork(sequence, depth, slot)
        result = harness.logprobs([paged.Chunk(resumed, tokens[depth:])])[0]
        assert_close(result, folder, tokens, depth)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_decode_that_reaches_a_boundary_leaves_a_checkpoint(load, seed, family):
    folder, model = load(family)
    tokens = prompt(random.Random(seed), folder, 120)
    harness = paged.PagedModel(model, seed)
    sequence, slot = harness.new_sequence(), harness.new_slot()
    harness.logprobs([paged.Chunk(sequence, tokens[:63])])
    harness.logprobs([paged.Chunk(sequence, tokens[63:64], [(1, slot)])])
    resumed = harness.fork(sequence, 64, slot)
    result = harness.logprobs([paged.Chunk(resumed, tokens[64:])])[0]
    assert_close(result, folder, tokens, 64)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_early_token_moves_the_last_output(load, seed, family):
    """What makes the other tests strong: the references tell apart prompts that differ early."""
    folder, _ = load(family)
    draw = random.Random(seed)

    def moved() -> float:
        tokens = prompt(draw, folder, 100)
        other = [(tokens[0] + 1) % tiny_models.VOCAB_SIZE, *tokens[1:]]
        last, changed = (tiny_models.reference_logprobs(folder, one)[-1] for one in (tokens, other))
        return float((last - changed).abs().max())

    assert max(moved() for _ in range(3)) > 50 * TOLERANCE  # few paths lead through short windows
