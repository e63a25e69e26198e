"""One step ahead: the same answers as in turn, and no unit changes hands under a step in flight.

What the other tests of the engine claim holds one step ahead as well; here is what running ahead
can break.
"""

import random
from collections import Counter
from typing import Any

import pytest
from history_engine import make
from history_model import VOCAB_SIZE, HistoryModel
from hypothesis import given, settings, strategies as st
from relay import greedy, merge, run

from tasuki_common.sampling import SamplingParams
from tasuki_engine.block_pool import Pool
from tasuki_engine.engine import Engine
from tasuki_engine.flights import Flights
from tasuki_engine.request import EngineRequest, TokenOutput

SIZES: dict[str, Any] = {
    "block_size": 8,
    "checkpoint_interval": 32,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 6,
    "max_model_len": 160,
    "num_blocks": 60,
    "num_window_blocks": 40,
    "num_state_slots": 24,
}


def _engine(run_ahead: int, **settings: Any) -> tuple[Engine, HistoryModel]:
    return make(run_ahead, "all", **(SIZES | settings))


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def test_a_step_is_launched_before_the_tokens_it_needs_are_read(rng: random.Random) -> None:
    engine, history = _engine(1)
    history.keep_steps = True
    prompt = _prompt(rng, 20)
    engine.add_request(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=greedy(8)))
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for output in engine.step().outputs for token in output.token_ids]
        assert len(history.steps) == min(len(tokens) + 1, 8)
    assert tokens == history.continuation(prompt, 8)


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 3]),
        "max_tokens": st.integers(0, 30),
        "min_tokens": st.sampled_from([0, 0, 5]),
        "stop_token_ids": st.sampled_from([None, None, list(range(0, VOCAB_SIZE, 7))]),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.0, 1.4]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.0, 0.9]),
        "logprobs": st.sampled_from([None, 2]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "logit_bias": st.sampled_from([None, {4: 9.0}]),
    }
).filter(lambda fields: fields["min_tokens"] <= fields["max_tokens"])
REQUESTS = st.lists(
    st.tuples(PARAMS, st.integers(0, 3), st.integers(1, 120), st.integers(0, 2), st.integers(0, 9)),
    min_size=1,
    max_size=10,
)


def _answers(run_ahead: int, drawn: list[Any], seed: int) -> dict[str, TokenOutput]:
    """Requests that arrive between steps; many share a beginning, and memory is short."""
    engine, _ = _engine(run_ahead)
    rng = random.Random(seed)
    bases = [_prompt(rng, 120) for _ in range(4)]
    merged: dict[str, TokenOutput] = {}
    for i, (params, base, length, priority, steps) in enumerate(drawn):
        prompt = bases[base][:length] + _prompt(rng, 3)
        engine.add_request(
            EngineRequest(
                request_id=str(i),
                prompt_token_ids=prompt,
                sampling=SamplingParams(seed=i, **params),
                priority=priority,
            )
        )
        for _ in range(steps):
            for output in engine.step().outputs:
                merge(merged, output)
            engine.check_integrity()
    for name, output in run(engine).items():
        merge(merged, output)
        assert output.error is None, name
    assert engine.stats().blocks_used == engine.stats().slots_used == 0
    return merged


@settings(max_examples=60)
@given(drawn=REQUESTS, seed=st.integers(0, 1 << 30))
def test_one_step_ahead_gives_the_answers_of_one_at_a_time(drawn: list[Any], seed: int) -> None:
    in_turn, ahead = _answers(0, drawn, seed), _answers(1, drawn, seed)
    assert in_turn.keys() == ahead.keys()
    for name, expected in in_turn.items():
        found = ahead[name]
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == expected.finish_reason
        assert found.stop_reason == expected.stop_reason
        assert found.logprobs == expected.logprobs
        assert found.prompt_logprobs == expected.prompt_logprobs


@pytest.mark.parametrize("end", ["stop", "abort"])
def test_units_of_an_ended_request_wait_for_the_step_that_still_writes_them(
    rng: random.Random, end: str
) -> None:
    engine, history = _engine(1, enable_prefix_caching=False, num_blocks=21)
    prompt = _prompt(rng, 100)
    history.eos_token_ids = (history.expected(prompt),)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=end == "abort")
    engine.add_request(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=params))
    results = [engine.step() for _ in range(3)]
    if end == "abort":
        engine.abort("r")
    else:
        assert results[-1].outputs[0].finish_reason == "stop"
    held = engine.stats().blocks_used
    assert held >= 13
    assert engine.reserve("import", _prompt(rng, 80), 80) is None
    engine.check_integrity()
    assert engine.has_work()
    assert not engine.step().outputs or end == "abort"
    assert engine.stats().blocks_used == 0
    assert engine.reserve("import", _prompt(rng, 80), 80) is not None
    engine.cancel("import")
    engine.check_integrity()
    assert not engine.has_work()


def test_what_is_dropped_waits_for_the_newest_step_in_flight() -> None:
    pool, flights = Pool("state", 8), Flights()
    now, later, source = pool.take(3) or []
    flights.drop(pool, now)
    assert pool.used == 2
    flights.launch([])
    flights.drop_source(pool, source)
    flights.launch([])
    flights.drop(pool, later)
    flights.settle()
    assert pool.used == 2
    counts: dict[str, Counter[int]] = {"state": Counter()}
    flights.add_owners(counts)
    assert counts["state"] == Counter([later, source])
    flights.settle()
    assert (pool.used, len(flights)) == (0, 0)


def test_the_source_of_a_copy_waits_for_the_step_after_the_copy() -> None:
    pool, flights = Pool("state", 8), Flights()
    (source,) = pool.take(1) or []
    flights.launch([])
    flights.drop_source(pool, source)
    flights.settle()
    assert pool.used == 1
    assert flights.copies
    flights.launch([])
    flights.settle()
    assert pool.used == 0
