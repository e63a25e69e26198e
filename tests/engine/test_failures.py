"""What fails in a step fails alone and leaves nothing wrong behind; a failed step ends the engine.

In turn and one step ahead.
"""

import math
import random

import pytest
import torch
from history_engine import MODELS, MakeEngine, make_request, random_prompt
from relay import compute_hand_over, greedy, hand_over, move, run

from tasuki_engine.engine import Engine
from tasuki_engine.request import CacheEvent


def _findable(events: list[CacheEvent]) -> set[tuple[str, bytes]]:
    names: set[tuple[str, bytes]] = set()
    for event in events:
        (names.add if event.stored else names.remove)((event.kind, event.hash))
    return names


def test_nobody_goes_on_from_what_a_failed_step_computed(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, model = make_engine("all")
    prompt = random_prompt(rng, 60)
    model.gives_nan = True
    failed = run(engine, [make_request("failed", prompt, sampling=greedy(8, logprobs=1))])["failed"]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert not engine.take_cache_events()
    model.gives_nan = False
    again = run(engine, [make_request("again", prompt)])["again"]
    assert again.num_cached_tokens == 0
    assert again.token_ids == model.continuation(prompt, 16)


def test_a_prompt_whose_scores_are_no_numbers_fails(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, model = make_engine()
    model.gives_nan = True
    params = greedy(0, prompt_logprobs=1)
    request = make_request("scored", random_prompt(rng, 75), sampling=params)
    scored = run(engine, [request])["scored"]
    assert (scored.finish_reason, scored.prompt_logprobs) == ("error", None)


def _spoil_memory(engine: Engine) -> None:
    for region in engine.regions().values():
        region.view(torch.float32)[1:].fill_(math.nan)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_whose_first_chunk_was_spoilt_fails_once_and_is_computed_anew(
    name: str, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, model = make_engine(name)
    prompt = random_prompt(rng, 75)  # a window of 20 tokens still sees the first chunk of 64
    model.spoils = 1
    failed = run(engine, [make_request("failed", prompt)])["failed"]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert not _findable(engine.take_cache_events())
    again = run(engine, [make_request("again", prompt)])["again"]
    assert again.num_cached_tokens == 0
    assert again.token_ids == model.continuation(prompt, 16)
    last = run(engine, [make_request("last", prompt)])["last"]
    assert last.num_cached_tokens == 72


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_was_spoilt_is_not_handed_over_and_is_computed_anew(
    name: str, make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, giving = make_engine(name)
    taker, model = make_engine(name)
    prompt = random_prompt(rng, 75)
    giving.spoils = 1
    reports = compute_hand_over(giver, "spoilt", prompt)
    assert not any(report.complete for report in reports)
    assert reports[-1].error is not None
    assert "finite" in reports[-1].error
    assert not _findable(giver.take_cache_events())
    assert giver.stats().blocks_used == giver.stats().slots_used == 0
    hand_over(giver, taker, "again", prompt)
    again = run(taker, [make_request("again", prompt, prefix_id="again")])["again"]
    assert (again.num_cached_tokens, again.token_ids) == (72, model.continuation(prompt, 16))
    taker.cancel("again")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("caching", [True, False])
def test_a_prefix_that_came_spoilt_fails_its_request_and_is_forgotten(
    name: str, caching: bool, make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, _ = make_engine(name)
    taker, model = make_engine(name, enable_prefix_caching=caching)
    prompt = random_prompt(rng, 60)
    hand_over(giver, taker, "spoilt", prompt)
    _spoil_memory(taker)
    stored = taker.take_cache_events()
    assert _findable(stored)
    failed = run(taker, [make_request("failed", prompt, prefix_id="spoilt")])["failed"]
    assert failed.finish_reason == "error"
    assert not _findable(stored + taker.take_cache_events())
    again = run(taker, [make_request("again", prompt, prefix_id="spoilt")])["again"]
    assert again.num_cached_tokens == 0
    assert again.token_ids == model.continuation(prompt, 16)
    taker.cancel("spoilt")
    taker.check_integrity()
    assert taker.stats().blocks_used == taker.stats().slots_used == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_that_arrives_later_does_not_name_again_what_was_forgotten(
    name: str, make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, _ = make_engine(name)
    taker, model = make_engine(name)
    prompt = random_prompt(rng, 75)
    compute_hand_over(taker, "here", prompt[:73])
    taker.release("here")
    _spoil_memory(taker)
    longer = [*prompt, *random_prompt(rng, 20)]
    reservation = taker.reserve("late", longer, 80)
    assert reservation is not None
    assert run(taker, [make_request("failed", prompt)])["failed"].finish_reason == "error"
    spans = [span for report in compute_hand_over(giver, "late", longer) for span in report.spans]
    move(giver, taker, spans, reservation)
    taker.commit("late")
    again = run(taker, [make_request("again", prompt, prefix_id="late")])["again"]
    assert again.token_ids == model.continuation(prompt, 16)
    taker.cancel("late")
    taker.check_integrity()


@pytest.mark.parametrize("name", MODELS)
def test_a_known_prompt_that_is_offered_while_it_is_forgotten_is_not_named_again(
    name: str, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, model = make_engine(name)
    prompt = random_prompt(rng, 60)
    compute_hand_over(engine, "first", prompt)
    engine.release("first")
    _spoil_memory(engine)
    engine.add_request(make_request("fails", prompt))
    offered = compute_hand_over(engine, "offered", prompt)
    assert offered[-1].complete
    engine.release("offered")
    again = run(engine, [make_request("again", prompt)])["again"]
    assert (again.num_cached_tokens, again.token_ids) == (0, model.continuation(prompt, 16))


def test_a_block_that_others_hold_loses_its_name_and_stays_theirs(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, model = make_engine("dense")
    shared = random_prompt(rng, 64)
    run(engine, [make_request("first", [*shared, 1, 2, 3])])
    holder, failing = ([*shared, *random_prompt(rng, length)] for length in (20, 100))
    model.fails_after = len(failing)
    requests = [make_request("holder", holder, sampling=greedy(60)), make_request("fails", failing)]
    outputs = run(engine, requests)
    assert [outputs[name].num_cached_tokens for name in ("holder", "fails")] == [64, 64]
    assert (outputs["fails"].finish_reason, outputs["fails"].token_ids) == ("error", [])
    assert outputs["holder"].token_ids == model.continuation(holder, 60)
    after = run(engine, [make_request("after", holder)])["after"]
    assert (after.num_cached_tokens, after.token_ids) == (0, model.continuation(holder, 16))


def test_an_error_in_a_step_ends_the_engine(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, model = make_engine("all")
    prompt = random_prompt(rng, 60)
    engine.add_request(make_request("first", prompt, sampling=greedy(60)))
    for _ in range(3):
        engine.step()
    engine.add_request(make_request("second", prompt[:40] + prompt))
    model.raises = True
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    model.raises = False
    with pytest.raises(RuntimeError, match=r"earlier step.*out of memory"):
        engine.step()
    with pytest.raises(RuntimeError, match="new engine"):
        engine.add_request(make_request("third", prompt))
