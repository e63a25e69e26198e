"""The mixer between its projections against float64, token by token: torch and Triton alike."""

import contextlib
import random

import fresh_seed
import pytest
import torch
from mamba_cases import Part, Sizes, Step

from tasuki_kernels import mamba2, ssd_plan
from tasuki_kernels.backend import interpreted

BOUND = 3e-5
SIZES = [Sizes(4, 8, 2, 16), Sizes(3, 12, 1, 20, kernel=3)]
WAYS = ["torch", "triton"]


def on(way):
    return interpreted() if way == "triton" else contextlib.nullcontext()


def assert_near(actual, expected):
    """A row whose group is nearly zero before its norm comes out with its rounding amplified."""
    assert actual.shape == expected.shape
    off = (actual.double() - expected).abs() / (1 + expected.abs())
    assert off.quantile(0.99) <= BOUND
    assert off.max() <= 10 * BOUND


def check(step, way):
    expected, written = step.expected()
    with on(way), torch.inference_mode():
        actual = step.run(random.choice([torch.int32, torch.int64]))
    assert_near(actual, expected)
    for slot, (window, state) in written.items():
        torch.testing.assert_close(step.conv[slot].double(), window, rtol=0, atol=0)
        torch.testing.assert_close(step.ssm[slot].double(), state, rtol=BOUND, atol=BOUND)
    assert step.untouched(written)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", SIZES)
def test_decodes_equal_float64_and_touch_only_their_slots(sizes, way):
    """A first token, running sequences, and padded rows, which own nothing."""
    parts = [Part(1, 1), Part(1, 7), Part(1, 2), Part(1, 500)]
    padding = [Part(1, 0)] * (2 if way == "triton" else 0)
    check(Step(sizes, parts + padding, seed=fresh_seed.fresh_seed(), with_bias=False), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", SIZES)
def test_prefills_beside_decodes_leave_states_and_checkpoints(sizes, way):
    seed = fresh_seed.fresh_seed()
    draw = random.Random(seed)
    length = draw.randrange(66, 100)
    parts = [
        Part(1, 1),
        Part(1, 40),
        Part(2, 2),
        Part(2, 17, (1,)),
        Part(length, length, (16, 64, 65)),
        Part(33, 33 + 7, (9, 25)),
        Part(64, 200),
    ]
    check(Step(sizes, parts, seed=seed), way)


def test_segments_pass_their_states_on(monkeypatch):
    """Long sequences are cut into segments that are scanned in parallel."""
    monkeypatch.setattr(ssd_plan, "MIN_SEGMENT", 64)
    parts = [Part(1, 3), Part(200, 200, (16, 144)), Part(20, 80), Part(130, 150, (118,))]
    check(Step(Sizes(2, 8, 1, 16), parts, seed=fresh_seed.fresh_seed()), "triton")


@pytest.mark.parametrize("way", WAYS)
def test_dt_stays_within_its_limits(way):
    parts = [Part(1, 4), Part(20, 20)]
    seed = fresh_seed.fresh_seed()
    check(Step(SIZES[0], parts, seed=seed, dt_limits=(0.1, 0.2)), way)


def test_rows_behind_the_sequences_get_zeros_and_disturb_nothing():
    step = Step(SIZES[0], [Part(21, 21, (16,))], seed=fresh_seed.fresh_seed())
    expected, written = step.expected()
    padded = torch.full((32, step.projected.shape[1]), float("nan"))
    padded[:21] = step.projected
    with interpreted():
        actual = mamba2.mix(padded, step.conv, step.ssm, step.mixer, step.plan())
    assert_near(actual[:21], expected)
    assert not actual[21:].any()
    for slot, (_, state) in written.items():
        torch.testing.assert_close(step.ssm[slot].double(), state, rtol=BOUND, atol=BOUND)
    assert step.untouched(written)


def test_every_token_lies_in_one_chunk_and_every_mark_ends_one():
    draw = random.Random(fresh_seed.fresh_seed())
    for _ in range(200):
        lens = [draw.randrange(1, 5000) for _ in range(draw.randrange(1, 5))]
        marks = [
            (seq, tokens, 100 + seq)
            for seq, length in enumerate(lens)
            for tokens in sorted(draw.sample(range(1, length), min(draw.randrange(6), length - 1)))
        ]
        lengths = torch.tensor(lens)
        plan = ssd_plan.plan_prefill(lens, marks, lengths, lengths, draw.choice([1, 64]))
        sizes = plan.bounds.diff()
        assert sizes.min() >= 1
        assert sizes.max() <= ssd_plan.CHUNK
        starts = torch.tensor([0, *lens]).cumsum(0)
        assert set(starts.tolist()) <= set(plan.bounds.tolist())
        ends = {int(starts[seq]) + tokens: slot for seq, tokens, slot in marks}
        for end, slot in zip(plan.bounds[1:].tolist(), plan.exports.tolist(), strict=True):
            assert slot == ends.get(end, -1)
        segments = plan.segments.tolist()
        assert [s[0] for s in segments] == [0, *[s[1] for s in segments[:-1]]]
        assert segments[-1][1] == len(plan.exports)
        for first, end, seq, _, is_last in segments:
            assert first < end
            assert starts[seq] <= plan.bounds[first] < plan.bounds[end] <= starts[seq + 1]
            assert (plan.bounds[end] == starts[seq + 1]) == bool(is_last)
