"""Tokens do not depend on batch, chunk, cache or preemption; who goes first, and what it holds up.

Equality with transformers is proved in test_equivalence.py.
"""

import random

import pytest
from history_engine import MODELS, MakeEngine, family, make_request, random_prompt
from relay import greedy, run


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [1, 7, 64, 256])
def test_tokens_do_not_depend_on_batch_chunks_or_cache(
    model: str, budget: int, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine(model, max_num_batched_tokens=budget)
    prompts = family(rng, 12 if budget > 1 else 4, 200)
    for turn in range(2):
        requests = [make_request(f"{turn}.{i}", prompt) for i, prompt in enumerate(prompts)]
        outputs = run(engine, requests)
        for request in requests:
            expected = history.continuation(request.prompt_token_ids, 16)
            assert outputs[request.request_id].token_ids == expected
            assert outputs[request.request_id].finish_reason == "length"


@pytest.mark.parametrize("model", ["dense", "hybrid", "windows", "all"])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_requests_compute_again_and_get_the_same_tokens(
    model: str, caching: bool, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine(
        model,
        enable_prefix_caching=caching,
        max_model_len=160,
        num_blocks=24,
        num_window_blocks=16,
        num_state_slots=14,
    )
    prompts = [random_prompt(rng, rng.randrange(20, 60)) for _ in range(12)]
    requests = [
        make_request(str(i), prompt, sampling=greedy(80), priority=i % 3)
        for i, prompt in enumerate(prompts)
    ]
    outputs = run(engine, requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        expected = history.continuation(request.prompt_token_ids, 80)
        assert outputs[request.request_id].token_ids == expected


def test_requests_of_one_step_never_use_what_that_step_computes(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine(max_num_batched_tokens=256)
    prompt = random_prompt(rng, 100)
    history.keep_steps = True
    outputs = run(engine, [make_request(str(i), prompt) for i in range(2)])
    assert [outputs[str(i)].num_cached_tokens for i in range(2)] in ([0, 0], [0, 96])
    for i in range(2):
        assert outputs[str(i)].token_ids == history.continuation(prompt, 16)
    for step in history.steps:
        written = {checkpoint.slot for checkpoint in step.checkpoints}
        assert step.state_slots is not None
        assert written.isdisjoint(step.state_slots.tolist())
        assert len(written) == len(step.checkpoints)


def test_lower_priority_values_go_first(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, _ = make_engine(max_num_seqs=1)
    for name, priority in (("low", 5), ("high", -5), ("middle", 0), ("second", -5)):
        engine.add_request(
            make_request(name, random_prompt(rng, 20), priority=priority, sampling=greedy(2))
        )
    ended: list[str] = []
    while engine.has_work():
        ended += [o.request_id for o in engine.step().outputs if o.finish_reason]
    assert ended == ["high", "second", "middle", "low"]


def test_a_long_prompt_does_not_stop_the_streams_of_others(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine()
    engine.add_request(
        make_request("stream", random_prompt(rng, 10), sampling=greedy(30), priority=1)
    )
    engine.step()
    engine.add_request(make_request("long", random_prompt(rng, 250), sampling=greedy(1)))
    for _ in range(4):
        assert "stream" in {o.request_id for o in engine.step().outputs}


@pytest.mark.parametrize(("length", "steps"), [(64, [64]), (68, [68]), (69, [64, 5])])
def test_the_end_of_a_prompt_may_overdraw_the_budget_by_a_sixteenth(
    length: int, steps: list[int], make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine("dense", max_num_batched_tokens=64)
    history.keep_steps = True
    run(engine, [make_request("one", random_prompt(rng, length), sampling=greedy(1))])
    assert [len(step.token_ids) for step in history.steps] == steps


def test_no_step_has_more_than_its_budget_and_a_sixteenth(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine(max_num_batched_tokens=64)
    history.keep_steps = True
    run(engine, [make_request(str(i), prompt) for i, prompt in enumerate(family(rng, 30, 200))])
    assert max(len(step.token_ids) for step in history.steps) <= 68
