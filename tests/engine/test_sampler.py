"""The sampler against a naive float64 reference: the distribution, and the samples drawn from it.

Not here: that the engine gives it the right rows, and stop strings, which are text.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import chi_square
import draw_margins
import naive_sampling
import pytest
import torch
from fresh_seed import fresh_seed
from hypothesis import given, settings, strategies as st

from tasuki_common.sampling import SamplingParams
from tasuki_engine import sampler
from tasuki_engine.request import TokenLogprobs
from tasuki_engine.sampler import SamplerRow
from tasuki_kernels import sampling

V = 50
STOP_IDS = (3, 7)


def row(
    seed: int = 0,
    *,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    sample_index: int = 0,
    **params: Any,
) -> SamplerRow:
    return SamplerRow(
        SamplingParams(**params), prompt or [], output or [], seed, sample_index, STOP_IDS
    )


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.7},
    "negative_penalties": {"presence_penalty": -1.0, "frequency_penalty": -0.2},
    "logit_bias": {"logit_bias": {0: 3.0, 1: -100.0, 7: 1.5}},
    "min_tokens": {"min_tokens": 12},
    "filters": {"temperature": 1.3, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
    "all": {
        "temperature": 0.8,
        "min_p": 0.01,
        "top_k": 30,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {3: 4.0, 9: 2.0},
        "min_tokens": 9,
    },
}


@pytest.mark.parametrize("field", FIELDS)
def test_samples_follow_the_exact_distribution(field: str) -> None:
    rng = random.Random(fresh_seed())
    logits = [rng.gauss(0, 2) for _ in range(V)]
    prompt = [rng.randrange(V) for _ in range(10)]
    output = [rng.randrange(V) for _ in range(8)]
    rows = [
        row(rng.randrange(-(2**63), 2**63), prompt=prompt, output=output, **FIELDS[field])
        for _ in range(10_000)
    ]
    probs, _ = naive_sampling.probabilities(logits, rows[0])
    tokens = sampler.sample(torch.tensor(logits).repeat(len(rows), 1), rows).token_ids
    counts = Counter(tokens)
    chi_square.assert_fits([counts[token] for token in range(V)], probs)


def noises(keys: list[int], size: int) -> torch.Tensor:
    return sampling.gumbel_noise(torch.tensor(keys), torch.arange(size))


def noise_of(key: Sequence[int], size: int) -> torch.Tensor:
    return noises([sampling.race_key(*key)], size)[0]


@pytest.mark.parametrize("axis", ["seed", "sample_index", "position", "token"])
def test_noise_along_each_axis_is_gumbels_and_independent(axis: str) -> None:
    rng = random.Random(fresh_seed())
    key = [rng.randrange(-(2**63), 2**63 - 2**20), rng.randrange(128), rng.randrange(100_000)]
    count = 20_000
    if axis == "token":
        noise = noise_of(key, count)
    else:
        at = ["seed", "sample_index", "position"].index(axis)
        keys = [sampling.race_key(*key[:at], key[at] + i, *key[at + 1 :]) for i in range(count)]
        noise = noises(keys, 12)[:, rng.randrange(12)]
    draws = noise.double().neg().exp().neg().exp().tolist()  # uniform in [0, 1]
    cells = 16
    single = Counter(min(int(draw * 256), 255) for draw in draws)
    chi_square.assert_fits([single[i] for i in range(256)], [1 / 256] * 256)
    for lag in (1, 2, 7):
        pairs = Counter(
            min(int(a * cells), 15) * cells + min(int(b * cells), 15)
            for a, b in zip(draws, draws[lag:], strict=False)
        )
        chi_square.assert_fits([pairs[i] for i in range(cells**2)], [1 / cells**2] * cells**2)


@pytest.mark.parametrize("axis", ["seed", "sample_index", "position"])
def test_winners_of_neighbouring_races_are_independent(axis: str) -> None:
    rng = random.Random(fresh_seed())
    key = [rng.randrange(2**40), rng.randrange(128), rng.randrange(100_000)]
    at = ["seed", "sample_index", "position"].index(axis)
    size, count = 12, 20_000
    keys = [sampling.race_key(*key[:at], key[at] + i, *key[at + 1 :]) for i in range(count)]
    winners = noises(keys, size).argmax(dim=-1).tolist()
    for lag in (1, 2, 7):
        pairs = Counter(a * size + b for a, b in zip(winners, winners[lag:], strict=False))
        chi_square.assert_fits([pairs[i] for i in range(size**2)], [1 / size**2] * size**2)


def test_the_tails_of_the_noise_are_gumbels() -> None:
    noise = noise_of([fresh_seed(), 0, 0], 1 << 22).double()
    for rate in (2.0**-12, 2.0**-16, 2.0**-18):
        high, low = -math.log(-math.log1p(-rate)), -math.log(-math.log(rate))
        for beyond in (int((noise > high).sum()), int((noise < low).sum())):
            expected = rate * len(noise)
            assert abs(beyond - expected) < 6 * math.sqrt(expected) + 6


def test_noise_is_that_of_the_naive_reference() -> None:
    rng = random.Random(fresh_seed())
    for seed in (0, 1, -1, -(2**63), 2**63 - 1, rng.randrange(-(2**63), 2**63)):
        key = (seed, rng.randrange(128), rng.randrange(1 << 20))
        expected = [naive_sampling.noise(*key, token) for token in range(500)]
        assert noise_of(key, 500).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_noise_of_some_tokens_is_theirs_among_all() -> None:
    keys = [sampling.race_key(fresh_seed(), i, i) for i in range(7)]
    tokens = torch.randperm(9001)[:1234]
    some = sampling.gumbel_noise(torch.tensor(keys), tokens)
    torch.testing.assert_close(some, noises(keys, 9001)[:, tokens], rtol=1e-6, atol=1e-6)


def test_neighbouring_keys_do_not_share_noise() -> None:
    keys = [
        sampling.race_key(*key) for key in itertools.product(range(-20, 20), range(20), range(20))
    ]
    assert len(set(keys)) == len(keys)


@settings(max_examples=100)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    field=st.sampled_from([*FIELDS]),
    size=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
)
def test_other_rounding_changes_a_token_only_where_the_first_two_are_as_close(
    seed: int, field: str, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    logits = torch.randn(40, V, generator=generator) * 3
    moved = logits + size * (2 * torch.rand(40, V, generator=generator) - 1)
    rows = [row(seed, prompt=[1], output=[2] * i, **FIELDS[field]) for i in range(len(logits))]
    before, after = (sampler.sample(each, rows).token_ids for each in (logits, moved))
    for values, each, token, other in zip(logits.tolist(), rows, before, after, strict=True):
        if token != other:
            assert draw_margins.of_row(values, each, token) <= 2 * size + 1e-5


@pytest.mark.parametrize("field", FIELDS)
def test_the_margin_is_positive_for_the_token_that_was_drawn_and_for_no_other(field: str) -> None:
    rng = random.Random(fresh_seed())
    for _ in range(20):
        logits = [rng.gauss(0, 2) for _ in range(V)]
        tokens = [rng.randrange(V) for _ in range(8)]
        each = row(rng.getrandbits(40), prompt=tokens, output=tokens, **FIELDS[field])
        (drawn,) = sampler.sample(torch.tensor([logits]), [each]).token_ids
        assert draw_margins.of_row(logits, each, drawn) > -1e-5
        others = [token for token in range(V) if token != drawn]
        assert all(draw_margins.of_row(logits, each, token) < 1e-5 for token in others)


def test_a_single_token_that_is_left_wins_whatever_its_noise() -> None:
    rows = [row(seed, output=[0] * seed) for seed in range(300)]
    logits = torch.full((300, V), -math.inf)
    logits[:, 31] = -7.0
    assert set(sampler.sample(logits, rows).token_ids) == {31}
    biases = {token: -math.inf for token in range(V) if token != 4}
    rows = [row(seed, logit_bias=biases) for seed in range(300)]
    assert set(sampler.sample(torch.zeros(300, V), rows).token_ids) == {4}


def test_weights_that_float32_cannot_hold_still_have_their_order() -> None:
    logits = torch.full((200, V), -200.0)
    logits[:, 9] = 0.0
    rows = [row(seed) for seed in range(200)]
    assert set(sampler.sample(logits, rows).token_ids) == {9}


@pytest.mark.parametrize("filters", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_tightest_filters_leave_the_likeliest(filters: dict[str, Any]) -> None:
    logits = torch.rand(200, V).argsort(dim=-1) / 10  # no two of a row are equal
    logits[::2, 5] = logits[::2].amax(dim=-1) + 1.0
    rows = [row(seed, **filters) for seed in range(200)]
    assert sampler.sample(logits, rows).token_ids == logits.argmax(dim=-1).tolist()


@st.composite
def any_row(draw: st.DrawFn) -> SamplerRow:
    tokens = st.lists(st.integers(0, V - 1), max_size=12)
    bias = st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100, width=32), max_size=4)
    params: dict[str, Any] = {
        "temperature": draw(st.floats(0.05, 5)),
        "top_k": draw(st.sampled_from([-1, 0, 1, 2, 5, V - 1, V, 10 * V])),
        "top_p": draw(st.one_of(st.just(1.0), st.floats(0.01, 1.0))),
        "min_p": draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
        "repetition_penalty": draw(st.one_of(st.just(1.0), st.floats(0.1, 3.0))),
        "presence_penalty": draw(st.one_of(st.just(0.0), st.floats(-2.0, 2.0))),
        "frequency_penalty": draw(st.one_of(st.just(0.0), st.floats(-2.0, 2.0))),
        "logit_bias": draw(st.one_of(st.none(), bias)),
        "min_tokens": draw(st.integers(0, 15)),
        "max_tokens": 100,
    }
    return row(prompt=draw(tokens), output=draw(tokens), **params)


@settings(max_examples=200)
@given(
    rows=st.lists(any_row(), min_size=1, max_size=6),
    values=st.lists(st.integers(-40, 40), min_size=V, max_size=V),
)
def test_the_distribution_is_the_references(rows: list[SamplerRow], values: list[int]) -> None:
    logits = [value / 4 for value in values]  # ties abound
    found = sampler.distribution(torch.tensor(logits).repeat(len(rows), 1), rows).double()
    found = found / found.sum(dim=-1, keepdim=True)
    for got, each in zip(found.tolist(), rows, strict=True):
        probs, margin = naive_sampling.probabilities(logits, each)
        sizes = [abs(v) for v in naive_sampling.adjusted_logits(logits, each) if v != -math.inf]
        coarse = 2.0**-22 * max(sizes) / each.params.temperature  # float32's own, of large logits
        if margin > 1e-5 + coarse:
            assert got == pytest.approx(probs, abs=2e-5 + coarse)


@pytest.mark.parametrize("candidates", [1, 4, 128])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_a_nucleus_of_any_width_is_the_references(
    monkeypatch: pytest.MonkeyPatch, candidates: int, spread: float
) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES", candidates)
    rng = random.Random(fresh_seed())
    size, compared = 3000, 0
    for top_p in (0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-9):
        logits = [round(rng.gauss(0, spread), 2) for _ in range(size)]
        each = row(top_p=top_p)
        found = sampler.distribution(torch.tensor([logits]), [each])[0].double()
        probs, margin = naive_sampling.probabilities(logits, each)
        if margin > 1e-7:
            assert ((found > 0) == (torch.tensor(probs) > 0)).all()
            compared += 1
    assert compared or spread > 0


def test_filters_keep_ties_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]] * 3)
    rows = [row(top_k=2), row(top_p=0.5), row(min_p=math.exp(-1))]
    kept = sampler.distribution(logits, rows) > 0
    assert kept.tolist() == [[True, True, True, True, False]] * 3


def any_batch(rng: random.Random, size: int) -> tuple[torch.Tensor, list[SamplerRow]]:
    rows = []
    for _ in range(size):
        params = dict(FIELDS[rng.choice(list(FIELDS))])
        params["logprobs"] = rng.choice([None, 0, 3])
        if rng.random() < 0.3:
            params["temperature"] = 0.0
        tokens = [rng.randrange(V) for _ in range(rng.randrange(20))]
        rows.append(row(rng.getrandbits(40), prompt=tokens, output=tokens[::2], **params))
    return torch.tensor([[rng.gauss(0, 2) for _ in range(V)] for _ in rows]), rows


def test_a_row_gets_the_same_token_in_any_batch() -> None:
    rng = random.Random(fresh_seed())
    logits, rows = any_batch(rng, 64)
    together = sampler.sample(logits, rows)
    alone = [sampler.sample(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    assert together.token_ids == [result.token_ids[0] for result in alone]
    order = rng.sample(range(len(rows)), len(rows))
    shuffled = sampler.sample(logits[order], [rows[i] for i in order])
    assert shuffled.token_ids == [together.token_ids[i] for i in order]


def test_rows_kept_from_step_to_step_count_as_fresh_ones_do() -> None:
    rng = random.Random(fresh_seed())
    kept = row(5, prompt=[1, 2, 3], **FIELDS["all"] | {"max_tokens": None})
    for _ in range(200):
        logits = torch.tensor([[rng.gauss(0, 2) for _ in range(V)]])
        output = list(kept.output_token_ids)
        fresh = row(5, prompt=[1, 2, 3], output=output, **FIELDS["all"] | {"max_tokens": None})
        token = sampler.sample(logits, [kept]).token_ids
        assert token == sampler.sample(logits, [fresh]).token_ids
        kept.output_token_ids.extend(token)


def test_logits_are_left_as_they_are() -> None:
    logits, rows = any_batch(random.Random(fresh_seed()), 32)
    before = logits.clone()
    sampler.sample(logits, rows)
    assert torch.equal(logits, before)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.zeros(2, V)
    logits[:, [11, 30]] = 5.0
    assert sampler.sample(logits, [row(temperature=0), row(temperature=1e-7)]).token_ids == [11, 11]


def test_tiny_temperatures_are_stable() -> None:
    logits = torch.tensor([[0.0, 1000.0, 999.0, -1000.0]] * 200)
    rows = [row(i, temperature=1.1e-5) for i in range(200)]
    assert set(sampler.sample(logits, rows).token_ids) == {1}


def test_greedy_rows_obey_bias_penalties_and_min_tokens() -> None:
    rng = random.Random(fresh_seed())
    for field, params in FIELDS.items():
        tokens = [rng.randrange(V) for _ in range(8)]
        each = row(prompt=tokens, output=tokens, **params | {"temperature": 0.0})
        logits = [rng.gauss(0, 2) for _ in range(V)]
        probs, _ = naive_sampling.probabilities(logits, each)
        token = sampler.sample(torch.tensor([logits]), [each]).token_ids[0]
        assert probs[token] == 1.0, field


def test_stop_tokens_are_masked_until_min_tokens_are_out() -> None:
    logits = torch.zeros(1, V)
    logits[0, 7] = 50.0
    early = row(temperature=0, min_tokens=2, output=[1])
    assert sampler.sample(logits, [early]).token_ids[0] not in STOP_IDS
    early.output_token_ids.append(2)
    assert sampler.sample(logits, [early]).token_ids == [7]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_distribution_gets_no_token_and_spoils_no_other(bad: float) -> None:
    logits = torch.zeros(4, V)
    logits[0, 5] = logits[2, 5] = bad
    assert sampler.sample(logits[:1], [row(min_p=0.1, top_k=2, top_p=0.5)]).token_ids == [-1]
    rows = [row(temperature=0), row(temperature=0), row(logprobs=2), row(logprobs=2)]
    result = sampler.sample(logits, rows)
    assert [token < 0 for token in result.token_ids] == [True, False, True, False]
    assert result.logprobs[2] is None
    assert result.logprobs[3] is not None


def check_logprobs(entry: TokenLogprobs, raw: list[float], token: int, top: int) -> None:
    log_total = math.log(math.fsum(math.exp(value) for value in raw))
    expected = [value - log_total for value in raw]
    assert entry.token.token_id == token
    assert entry.token.logprob == pytest.approx(expected[token], abs=1e-5)
    assert entry.token.rank == 1 + sum(value > raw[token] for value in raw)
    assert len(entry.top) == top
    best = sorted(expected, reverse=True)[:top]
    assert [each.logprob for each in entry.top] == pytest.approx(best, abs=1e-5)
    assert [each.rank for each in entry.top] == list(range(1, top + 1))
    assert [expected[each.token_id] for each in entry.top] == pytest.approx(best, abs=1e-5)


def test_logprobs_are_of_the_raw_logits_and_only_where_asked_for() -> None:
    logits, rows = any_batch(random.Random(fresh_seed()), 64)
    result = sampler.sample(logits, rows)
    for i, (each, token) in enumerate(zip(rows, result.token_ids, strict=True)):
        entry = result.logprobs[i]
        if each.params.logprobs is None:
            assert entry is None
        else:
            assert entry is not None
            check_logprobs(entry, logits[i].tolist(), token, each.params.logprobs)


@pytest.mark.parametrize("top", [0, 1, 5, V + 10])
def test_prompt_logprobs_are_of_the_tokens_that_came_next(top: int) -> None:
    rng = random.Random(fresh_seed())
    raw = torch.tensor([[rng.gauss(0, 2) for _ in range(V)] for _ in range(9)]).tolist()
    following = [rng.randrange(V) for _ in raw]
    entries = sampler.prompt_logprobs(torch.tensor(raw), following, top)
    for entry, values, token in zip(entries, raw, following, strict=True):
        check_logprobs(entry, values, token, min(top, V))
