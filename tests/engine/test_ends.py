"""How requests end, what a prompt's scores are, and how one goes on that began elsewhere."""

import random
import time

from history_engine import MakeEngine, make_request, random_prompt
from relay import greedy, run


def test_eos_and_stop_tokens_end_with_their_reasons(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine()
    prompt = random_prompt(rng, 30)
    tokens = history.continuation(prompt, 16)
    stop = tokens[5]
    first = tokens.index(stop)
    params = greedy(16, stop_token_ids=[stop])
    output = run(engine, [make_request("stop", prompt, sampling=params)])["stop"]
    assert output.token_ids == tokens[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    history.eos_token_ids = (stop,)
    params = greedy(16, ignore_eos=False)
    output = run(engine, [make_request("eos", prompt, sampling=params)])["eos"]
    assert output.token_ids == tokens[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    params = greedy(16, ignore_eos=False, min_tokens=first + 2)
    output = run(engine, [make_request("min", prompt, sampling=params)])["min"]
    assert len(output.token_ids) > first + 1
    assert stop not in output.token_ids[: first + 2]


def test_the_context_length_ends_a_request(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, history = make_engine()
    prompt = random_prompt(rng, 250)
    output = run(engine, [make_request("long", prompt, sampling=greedy(100))])["long"]
    assert output.token_ids == history.continuation(prompt, 6)
    assert output.finish_reason == "length"


def test_a_prompt_is_scored_without_generating(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, history = make_engine(max_num_batched_tokens=7)
    prompt = random_prompt(rng, 50)
    run(engine, [make_request("warm", prompt)])
    params = greedy(0, prompt_logprobs=2)
    output = run(engine, [make_request("score", prompt, sampling=params)])["score"]
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.num_cached_tokens == 0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.token.token_id == prompt[position]
        assert entry.top[0].token_id == history.expected(prompt[:position])
    nothing = run(engine, [make_request("nothing", prompt, sampling=greedy(0))])["nothing"]
    assert (nothing.token_ids, nothing.finish_reason) == ([], "length")


def test_a_long_prompt_is_scored_in_parts_however_large_the_budget(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine(max_num_batched_tokens=4096, max_model_len=1592, num_blocks=200)
    prompt = random_prompt(rng, 1500)
    params = greedy(0, prompt_logprobs=0)
    output = run(engine, [make_request("score", prompt, sampling=params)])["score"]
    assert output.prompt_logprobs is not None
    assert [entry and entry.token.token_id for entry in output.prompt_logprobs] == [
        None,
        *prompt[1:],
    ]
    assert engine.stats().steps == 2  # 1,024 tokens at most


def test_prompt_logprobs_come_once_with_the_first_token(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine(num_blocks=30, max_model_len=128, num_state_slots=20)
    prompts = [random_prompt(rng, 60) for _ in range(4)]
    params = greedy(60, prompt_logprobs=0)
    outputs = run(engine, [make_request(str(i), p, sampling=params) for i, p in enumerate(prompts)])
    assert engine.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        logprobs = outputs[str(i)].prompt_logprobs
        assert logprobs is not None
        assert [entry and entry.token.token_id for entry in logprobs] == [None, *prompt[1:]]
        assert outputs[str(i)].token_ids == history.continuation(prompt, 60)


def test_a_resumed_request_goes_on_where_it_was(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine()
    prompt = random_prompt(rng, 45)
    tokens = history.continuation(prompt, 16)
    for done in (1, 7, 15):
        request = make_request(str(done), prompt, output_token_ids=tokens[:done])
        output = run(engine, [request])[str(done)]
        assert output.token_ids == tokens[done:]
    finished = run(engine, [make_request("all", prompt, output_token_ids=tokens)])["all"]
    assert (finished.token_ids, finished.finish_reason) == ([], "length")


def test_a_deadline_ends_what_runs_and_what_waits(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request(
        make_request("runs", random_prompt(rng, 20), sampling=greedy(200), timeout=0.05)
    )
    engine.add_request(make_request("waits", random_prompt(rng, 20), timeout=0.05))
    engine.add_request(make_request("hands", random_prompt(rng, 20), timeout=0.05, hand_over=True))
    engine.add_request(make_request("stays", random_prompt(rng, 20)))
    results = [engine.step()]
    time.sleep(0.06)
    results.append(engine.step())  # on a starved machine the first was late already
    late = {o.request_id for r in results for o in r.outputs if o.finish_reason == "deadline"}
    assert late == {"runs", "waits"}
    assert [h.request_id for r in results for h in r.hand_overs if h.error] == ["hands"]
    assert run(engine)["stays"].finish_reason == "length"


def test_deadlines_of_requests_that_have_ended_are_not_kept(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    for i in range(500):
        engine.add_request(make_request(f"r{i}", [1, 2, 3], timeout=600.0))
        engine.abort(f"r{i}")
    engine.step()
    assert len(engine._deadlines._entries) < 100
