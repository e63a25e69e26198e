"""Both sides of a hand-over: what is offered when, what is wanted, and what it pins."""

import random

import pytest
from history_engine import MODELS, MakeEngine, family, make_request, random_prompt
from relay import compute_hand_over, hand_over, move, run

from tasuki_common.errors import RequestError


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("caching", [True, False])
def test_a_handed_over_prompt_goes_on_with_the_same_tokens(
    model: str, caching: bool, make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, history = make_engine(model, enable_prefix_caching=caching)
    taker, _ = make_engine(model, enable_prefix_caching=caching)
    for i, prompt in enumerate(family(rng, 10, 200)):
        name = str(i)
        reservation = hand_over(giver, taker, name, prompt)
        depth = (len(prompt) - 1) // 8 * 8
        assert reservation.num_tokens == depth
        requests = [make_request(f"{name}.{j}", prompt, prefix_id=name) for j in range(3)]
        outputs = run(taker, requests)
        taker.cancel(name)
        taker.check_integrity()
        for output in outputs.values():
            assert output.token_ids == history.continuation(prompt, 16)
            assert output.num_cached_tokens == depth
    for engine in (giver, taker):
        stats = engine.stats()
        assert (stats.blocks_used, stats.window_blocks_used, stats.slots_used) == (0, 0, 0)
        if not caching:
            assert (stats.blocks_cached, stats.slots_cached) == (0, 0)


def test_spans_are_offered_chunk_by_chunk_and_the_state_comes_last(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, _ = make_engine("all")
    reports = compute_hand_over(giver, "one", random_prompt(rng, 150))
    assert [report.num_tokens for report in reports] == [64, 128, 144]
    assert [report.complete for report in reports] == [False, False, True]
    pools = [[span.pool for span in report.spans] for report in reports]
    assert pools[0] == pools[1] == ["full"] * 8
    # 144 - 20 + 1 = 125 is the first token that token 144 sees: blocks 15 to 17.
    assert pools[2] == ["full", "full", "window", "window", "window", "state"]
    assert [s.ordinal for s in reports[2].spans if s.pool == "window"] == [15, 16, 17]
    used = giver.stats()
    assert (used.blocks_used, used.window_blocks_used, used.slots_used) == (18, 3, 1)
    again = compute_hand_over(giver, "two", list(range(5)))
    assert [(report.num_tokens, report.complete, report.spans) for report in again] == [
        (0, True, [])
    ]
    giver.release("one")
    giver.release("two")
    assert giver.stats().blocks_used == 0


def test_a_known_prompt_is_offered_at_once_without_a_step(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, history = make_engine("all")
    prompt = random_prompt(rng, 150)
    first = compute_hand_over(giver, "one", prompt)
    history.keep_steps = True
    (second,) = compute_hand_over(giver, "two", prompt)
    assert (second.complete, second.num_cached_tokens) == (True, 144)
    assert history.steps == []
    assert second.spans == [
        *(span for report in first for span in report.spans if span.pool == "full"),
        *(span for report in first for span in report.spans if span.pool != "full"),
    ]
    giver.release("one")
    giver.check_integrity()
    assert giver.stats().slots_used == 1
    giver.release("two")
    giver.check_integrity()


def test_only_missing_spans_are_wanted(make_engine: MakeEngine, rng: random.Random) -> None:
    giver, _ = make_engine("all")
    taker, history = make_engine("all")
    prompt = random_prompt(rng, 150)
    run(taker, [make_request("known", prompt[:100])])
    reports = compute_hand_over(giver, "one", prompt)
    reservation = taker.reserve("one", prompt, 144)
    assert reservation is not None
    assert reservation.num_local_tokens == 96
    assert sorted(reservation.wanted["full"]) == list(range(12, 18))
    assert sorted(reservation.wanted["window"]) == [15, 16, 17]
    assert list(reservation.wanted["state"]) == [0]
    assert move(giver, taker, [s for r in reports for s in r.spans], reservation) == 10
    taker.commit("one")
    again = taker.reserve("again", prompt, 144)
    assert again is not None
    assert (again.wanted, again.num_local_tokens) == ({}, 144)
    for prefix_id in ("one", "again"):
        taker.cancel(prefix_id)
    output = run(taker, [make_request("goes on", prompt)])["goes on"]
    assert output.num_cached_tokens == 144
    assert output.token_ids == history.continuation(prompt, 16)


def test_a_reservation_without_room_holds_nothing(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    taker, _ = make_engine(num_blocks=40, num_state_slots=8)
    assert taker.reserve("big", random_prompt(rng, 250), 248) is not None
    assert taker.reserve("none left", random_prompt(rng, 250), 248) is None
    taker.check_integrity()
    taker.cancel("big")
    taker.check_integrity()
    assert taker.stats().blocks_used == 0
    with pytest.raises(RequestError, match="multiple of 8"):
        taker.reserve("odd", random_prompt(rng, 20), 12)
    with pytest.raises(RequestError, match="not reserved"):
        taker.commit("big")


def test_a_cancelled_reservation_leaves_nothing_to_find(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    taker, history = make_engine()
    prompt = random_prompt(rng, 100)
    taker.reserve("gone", prompt, 96)
    taker.cancel("gone")
    output = run(taker, [make_request("alone", prompt, prefix_id="gone")])["alone"]
    assert (output.num_cached_tokens, output.token_ids) == (0, history.continuation(prompt, 16))


def test_pinned_prefixes_never_block_each_others_requests(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, history = make_engine(num_blocks=400)
    taker, _ = make_engine(num_blocks=34, max_model_len=256, num_state_slots=12)
    prompts = {str(i): random_prompt(rng, 129) for i in range(2)}
    for name, prompt in prompts.items():
        hand_over(giver, taker, name, prompt)
    filler = random_prompt(rng, 8)
    assert taker.reserve("filler", filler, 8) is not None
    taker.commit("filler")
    assert taker.stats().blocks_used == 33
    outputs = run(taker, [make_request(n, p, prefix_id=n) for n, p in prompts.items()])
    for name, prompt in prompts.items():
        assert outputs[name].token_ids == history.continuation(prompt, 16)


def test_a_hand_over_ended_early_reports_an_error_and_pins_nothing(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, _ = make_engine()
    giver.add_request(make_request("cut", random_prompt(rng, 150), hand_over=True))
    assert not giver.step().hand_overs[0].complete
    giver.abort("cut")
    (report,) = giver.step().hand_overs
    assert report.error == "The request was aborted."
    assert giver.stats().blocks_used == 0
    giver.check_integrity()


def test_generations_change_when_a_unit_is_given_out_again(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, _ = make_engine(num_blocks=34, num_state_slots=4, max_num_seqs=1)
    reports = compute_hand_over(giver, "one", random_prompt(rng, 150))
    spans = [span for report in reports for span in report.spans]
    giver.release("one")
    assert all(giver.generation(s.pool, s.index) == s.generation for s in spans)
    run(giver, [make_request(str(i), random_prompt(rng, 200)) for i in range(4)])
    assert all(giver.generation(s.pool, s.index) > s.generation for s in spans)


def test_engines_of_one_layout_have_one_fingerprint(make_engine: MakeEngine) -> None:
    assert make_engine()[0].fingerprint == make_engine(num_blocks=100)[0].fingerprint
    assert make_engine()[0].fingerprint != make_engine(block_size=16)[0].fingerprint
    assert make_engine()[0].fingerprint != make_engine("dense")[0].fingerprint


def test_a_queue_behind_leases_stalls_without_work_and_goes_on_after_them(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, history = make_engine(num_blocks=34)
    compute_hand_over(giver, "leased", random_prompt(rng, 200))
    prompt = random_prompt(rng, 100)
    giver.add_request(make_request("waits", prompt))
    for _ in range(3):
        result = giver.step()
        assert (result.outputs, result.hand_overs) == ([], [])
        assert giver.stalled
    giver.release("leased")
    assert run(giver)["waits"].token_ids == history.continuation(prompt, 16)
    assert not giver.stalled


def test_a_hand_over_that_cannot_grow_waits_for_the_window_blocks_of_leases(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    giver, _ = make_engine("windows", num_window_blocks=9, max_num_seqs=1)
    prompts = [random_prompt(rng, 200) for _ in range(3)]
    for i in range(2):
        compute_hand_over(giver, str(i), prompts[i])
    giver.add_request(make_request("2", prompts[2], hand_over=True))
    for _ in range(200):
        if giver.stalled:
            break
        giver.step()
    giver.release("0")
    giver.release("1")
    reports = []
    while giver.has_work():
        reports += giver.step().hand_overs
    assert reports[-1].complete
    giver.check_integrity()
