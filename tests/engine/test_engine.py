"""The engine on a model whose every token shows whether each cache held the right history.

Equality with transformers is proved in test_equivalence.py; here are policy, books and verbs.
"""

import random
import time
from typing import Any

import pytest
from fresh_seed import fresh_seed
from history_model import VOCAB_SIZE, HistoryModel
from relay import GREEDY, compute_hand_over, greedy, hand_over, merge, move, run

from tasuki_common.errors import ConfigError, OverloadedError, RequestError
from tasuki_common.hashing import block_hashes, root_hash
from tasuki_common.sampling import SamplingParams
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.request import EngineRequest, TokenOutput

MODELS: dict[str, dict[str, Any]] = {
    "dense": {"state": False},
    "hybrid": {},
    "windows": {"full": False, "window": 20, "state": False},
    "all": {"window": 20},
    "recurrent": {"full": False},
}
SIZES: dict[str, Any] = {
    "block_size": 8,
    "checkpoint_interval": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "max_model_len": 256,
    "num_blocks": 400,
    "num_window_blocks": 200,
    "num_state_slots": 60,
}


def _engine(model: str = "hybrid", **settings: Any) -> tuple[Engine, HistoryModel]:
    history = HistoryModel(**MODELS[model])
    return Engine(EngineConfig(model="history", **(SIZES | settings)), history), history


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


def _request(name: str, prompt: list[int], **fields: Any) -> EngineRequest:
    return EngineRequest(
        **{"request_id": name, "prompt_token_ids": prompt, "sampling": GREEDY, **fields}
    )


@pytest.fixture
def rng() -> random.Random:
    return random.Random(fresh_seed())


def _family(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    """Prompts of which many begin alike."""
    prompts = [_prompt(rng, rng.randrange(1, longest))]
    while len(prompts) < count:
        base = rng.choice(prompts)
        shared = base[: rng.randrange(len(base) + 1)]
        prompts.append((shared + _prompt(rng, rng.randrange(1, 40)))[: longest - 1])
    return prompts


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [1, 7, 64, 256])
def test_tokens_do_not_depend_on_batch_chunks_or_cache(
    model: str, budget: int, rng: random.Random
) -> None:
    engine, history = _engine(model, max_num_batched_tokens=budget)
    prompts = _family(rng, 12 if budget > 1 else 4, 200)
    for turn in range(2):
        requests = [_request(f"{turn}.{i}", prompt) for i, prompt in enumerate(prompts)]
        outputs = run(engine, requests)
        for request in requests:
            expected = history.continuation(request.prompt_token_ids, 16)
            assert outputs[request.request_id].token_ids == expected
            assert outputs[request.request_id].finish_reason == "length"


@pytest.mark.parametrize("model", ["dense", "hybrid", "windows", "all"])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_requests_compute_again_and_get_the_same_tokens(
    model: str, caching: bool, rng: random.Random
) -> None:
    engine, history = _engine(
        model,
        enable_prefix_caching=caching,
        max_model_len=160,
        num_blocks=24,
        num_window_blocks=16,
        num_state_slots=14,
    )
    prompts = [_prompt(rng, rng.randrange(20, 60)) for _ in range(12)]
    requests = [
        _request(str(i), prompt, sampling=greedy(80), priority=i % 3)
        for i, prompt in enumerate(prompts)
    ]
    outputs = run(engine, requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        expected = history.continuation(request.prompt_token_ids, 80)
        assert outputs[request.request_id].token_ids == expected


@pytest.mark.parametrize(
    ("model", "depth"), [("dense", 144), ("hybrid", 128), ("windows", 144), ("all", 128)]
)
def test_the_hit_counter_moves_exactly_as_the_arithmetic_says(
    model: str, depth: int, rng: random.Random
) -> None:
    engine, _ = _engine(model)
    prompt = _prompt(rng, 151)
    run(engine, [_request("first", prompt)])
    assert engine.stats().prefix_hit_tokens == 0
    outputs = run(engine, [_request("longer", prompt[:150] + _prompt(rng, 40))])
    # Blocks reach to 144. A hybrid needs a state: the prompt's end, or a multiple of 32.
    at_prompt_end = 144
    deepest = {"dense": 144, "windows": 144}.get(model, at_prompt_end)
    assert outputs["longer"].num_cached_tokens == deepest
    outputs = run(engine, [_request("branch", prompt[:140] + _prompt(rng, 40))])
    branch = depth if depth == 128 else 136
    assert outputs["branch"].num_cached_tokens == branch
    stats = engine.stats()
    assert stats.prefix_hit_tokens == deepest + branch
    assert stats.prefix_query_tokens == 151 + 190 + 180


def test_a_branch_point_gets_a_checkpoint_once_it_is_seen(rng: random.Random) -> None:
    engine, _ = _engine()
    shared = _prompt(rng, 109)  # blocks reach to 104, regular checkpoints to 96
    prompts = [shared + _prompt(rng, 30) for _ in range(3)]
    cached = [
        run(engine, [_request(str(i), prompt)])[str(i)].num_cached_tokens
        for i, prompt in enumerate(prompts)
    ]
    assert cached == [0, 96, 104]


def test_blocks_known_beyond_the_state_are_shared_and_not_written(rng: random.Random) -> None:
    engine, history = _engine()
    shared = _prompt(rng, 109)
    run(engine, [_request("first", shared + _prompt(rng, 30))])
    before = engine.stats().blocks_cached
    region = engine.regions()["full"].clone()
    generations = {unit: engine.generation("full", unit) for unit in range(1, 400)}
    tail = _prompt(rng, 3)
    output = run(engine, [_request("second", shared[:106] + tail, sampling=greedy(1))])["second"]
    assert output.token_ids == history.continuation(shared[:106] + tail, 1)
    assert engine.stats().blocks_cached == before
    kept = [u for u, g in generations.items() if g and engine.generation("full", u) == g]
    assert len(kept) >= 17
    assert (engine.regions()["full"][kept] == region[kept]).all()


def test_requests_of_one_step_never_use_what_that_step_computes(rng: random.Random) -> None:
    engine, history = _engine(max_num_batched_tokens=256)
    prompt = _prompt(rng, 100)
    history.keep_steps = True
    outputs = run(engine, [_request(str(i), prompt) for i in range(2)])
    assert [outputs[str(i)].num_cached_tokens for i in range(2)] in ([0, 0], [0, 96])
    for i in range(2):
        assert outputs[str(i)].token_ids == history.continuation(prompt, 16)
    for step in history.steps:
        written = {checkpoint.slot for checkpoint in step.checkpoints}
        assert step.state_slots is not None
        assert written.isdisjoint(step.state_slots.tolist())
        assert len(written) == len(step.checkpoints)


def test_salts_separate_caches(rng: random.Random) -> None:
    engine, _ = _engine()
    prompt = _prompt(rng, 100)
    cached = [
        run(engine, [_request(str(i), prompt, cache_salt=salt)])[str(i)].num_cached_tokens
        for i, salt in enumerate(["a", "b", "a", None])
    ]
    assert cached == [0, 0, 96, 0]


@pytest.mark.parametrize("model", MODELS)
def test_without_prefix_caching_nothing_is_kept(model: str, rng: random.Random) -> None:
    engine, _ = _engine(model, enable_prefix_caching=False)
    prompt = _prompt(rng, 100)
    for i in range(2):
        assert run(engine, [_request(str(i), prompt)])[str(i)].num_cached_tokens == 0
    stats = engine.stats()
    assert (stats.blocks_cached, stats.slots_cached, stats.prefix_query_tokens) == (0, 0, 0)
    assert engine.take_cache_events() == []


def test_cache_events_say_what_can_be_found(rng: random.Random) -> None:
    engine, _ = _engine(num_blocks=40, num_state_slots=20, max_num_seqs=4)
    findable: set[tuple[str, bytes]] = set()
    for i in range(12):
        run(engine, [_request(str(i), prompt) for i, prompt in enumerate(_family(rng, 3, 120))])
        for event in engine.take_cache_events():
            key = (event.kind, event.hash)
            assert event.stored != (key in findable)
            (findable.add if event.stored else findable.remove)(key)
    stats = engine.stats()
    assert sum(kind == "block" for kind, _ in findable) == stats.blocks_cached
    assert sum(kind == "checkpoint" for kind, _ in findable) == stats.slots_cached


@pytest.mark.parametrize("imported", [False, True])
def test_cache_events_name_the_block_before_each_block(rng: random.Random, imported: bool) -> None:
    engine, _ = _engine()
    prompt = _prompt(rng, 100)
    if imported:
        giver, _ = _engine()
        hand_over(giver, engine, "p", prompt)
    else:
        run(engine, [_request("r", prompt)])
    parents = {e.hash: e.parent for e in engine.take_cache_events() if e.kind == "block"}
    root = root_hash(engine.config.hash_algorithm, engine.hash_revision)
    names = block_hashes(engine.config.hash_algorithm, root, prompt, engine.config.block_size)
    assert [parents[name] for name in names] == [b"", *names[:-1]]


# Ends


def test_eos_and_stop_tokens_end_with_their_reasons(rng: random.Random) -> None:
    engine, history = _engine()
    prompt = _prompt(rng, 30)
    tokens = history.continuation(prompt, 16)
    stop = tokens[5]
    first = tokens.index(stop)
    params = greedy(16, stop_token_ids=[stop])
    output = run(engine, [_request("stop", prompt, sampling=params)])["stop"]
    assert output.token_ids == tokens[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    history.eos_token_ids = (stop,)
    params = greedy(16, ignore_eos=False)
    output = run(engine, [_request("eos", prompt, sampling=params)])["eos"]
    assert output.token_ids == tokens[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    params = greedy(16, ignore_eos=False, min_tokens=first + 2)
    output = run(engine, [_request("min", prompt, sampling=params)])["min"]
    assert len(output.token_ids) > first + 1
    assert stop not in output.token_ids[: first + 2]


def test_the_context_length_ends_a_request(rng: random.Random) -> None:
    engine, history = _engine()
    prompt = _prompt(rng, 250)
    output = run(engine, [_request("long", prompt, sampling=greedy(100))])["long"]
    assert output.token_ids == history.continuation(prompt, 6)
    assert output.finish_reason == "length"


def test_a_prompt_is_scored_without_generating(rng: random.Random) -> None:
    engine, history = _engine(max_num_batched_tokens=7)
    prompt = _prompt(rng, 50)
    run(engine, [_request("warm", prompt)])
    params = greedy(0, prompt_logprobs=2)
    output = run(engine, [_request("score", prompt, sampling=params)])["score"]
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.num_cached_tokens == 0
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.token.token_id == prompt[position]
        assert entry.top[0].token_id == history.expected(prompt[:position])
    nothing = run(engine, [_request("nothing", prompt, sampling=greedy(0))])["nothing"]
    assert (nothing.token_ids, nothing.finish_reason) == ([], "length")


def test_a_long_prompt_is_scored_in_parts_however_large_the_budget(rng: random.Random) -> None:
    engine, _ = _engine(max_num_batched_tokens=4096, max_model_len=1592, num_blocks=200)
    prompt = _prompt(rng, 1500)
    params = greedy(0, prompt_logprobs=0)
    output = run(engine, [_request("score", prompt, sampling=params)])["score"]
    assert output.prompt_logprobs is not None
    assert [entry and entry.token.token_id for entry in output.prompt_logprobs] == [
        None,
        *prompt[1:],
    ]
    assert engine.stats().steps == 2  # 1,024 tokens at most


def test_prompt_logprobs_come_once_with_the_first_token(rng: random.Random) -> None:
    engine, history = _engine(num_blocks=30, max_model_len=128, num_state_slots=20)
    prompts = [_prompt(rng, 60) for _ in range(4)]
    params = greedy(60, prompt_logprobs=0)
    outputs = run(engine, [_request(str(i), p, sampling=params) for i, p in enumerate(prompts)])
    assert engine.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        logprobs = outputs[str(i)].prompt_logprobs
        assert logprobs is not None
        assert [entry and entry.token.token_id for entry in logprobs] == [None, *prompt[1:]]
        assert outputs[str(i)].token_ids == history.continuation(prompt, 60)


def test_a_resumed_request_goes_on_where_it_was(rng: random.Random) -> None:
    engine, history = _engine()
    prompt = _prompt(rng, 45)
    tokens = history.continuation(prompt, 16)
    for done in (1, 7, 15):
        request = _request(str(done), prompt, output_token_ids=tokens[:done])
        output = run(engine, [request])[str(done)]
        assert output.token_ids == tokens[done:]
    finished = run(engine, [_request("all", prompt, output_token_ids=tokens)])["all"]
    assert (finished.token_ids, finished.finish_reason) == ([], "length")


def test_a_deadline_ends_what_runs_and_what_waits(rng: random.Random) -> None:
    engine, _ = _engine(max_num_seqs=1)
    engine.add_request(_request("runs", _prompt(rng, 20), sampling=greedy(200), timeout=0.05))
    engine.add_request(_request("waits", _prompt(rng, 20), timeout=0.05))
    engine.add_request(_request("hands", _prompt(rng, 20), timeout=0.05, hand_over=True))
    engine.add_request(_request("stays", _prompt(rng, 20)))
    engine.step()
    time.sleep(0.06)
    result = engine.step()
    assert {o.request_id for o in result.outputs if o.finish_reason == "deadline"} == {
        "runs",
        "waits",
    }
    assert [h.request_id for h in result.hand_overs if h.error] == ["hands"]
    assert run(engine)["stays"].finish_reason == "length"


def test_requests_that_give_up_behind_one_that_waits_are_forgotten(rng: random.Random) -> None:
    engine, _ = _engine(num_blocks=40)
    held = _prompt(rng, 240)
    assert engine.reserve("held", held, 240) is not None
    engine.add_request(_request("head", _prompt(rng, 200)))
    for i in range(500):
        engine.add_request(_request(f"r{i}", [1, 2, 3]))
        engine.abort(f"r{i}")
    assert len(engine._scheduler._waiting) < 100
    engine.cancel("held")
    assert run(engine)["head"].finish_reason == "length"


def test_lower_priority_values_go_first(rng: random.Random) -> None:
    engine, _ = _engine(max_num_seqs=1)
    for name, priority in (("low", 5), ("high", -5), ("middle", 0), ("second", -5)):
        engine.add_request(_request(name, _prompt(rng, 20), priority=priority, sampling=greedy(2)))
    ended: list[str] = []
    while engine.has_work():
        ended += [o.request_id for o in engine.step().outputs if o.finish_reason]
    assert ended == ["high", "second", "middle", "low"]


def test_a_long_prompt_does_not_stop_the_streams_of_others(rng: random.Random) -> None:
    engine, _ = _engine()
    engine.add_request(_request("stream", _prompt(rng, 10), sampling=greedy(30), priority=1))
    engine.step()
    engine.add_request(_request("long", _prompt(rng, 250), sampling=greedy(1)))
    for _ in range(4):
        assert "stream" in {o.request_id for o in engine.step().outputs}


def test_admission_ends_where_the_limits_are(rng: random.Random) -> None:
    engine, _ = _engine(max_queued_requests=3, max_queued_tokens=50)
    for i in range(3):
        engine.add_request(_request(str(i), _prompt(rng, 10)))
    with pytest.raises(OverloadedError):
        engine.add_request(_request("one too many", _prompt(rng, 10)))
    engine.abort("0")
    with pytest.raises(OverloadedError):
        engine.add_request(_request("too long", _prompt(rng, 40)))
    engine.add_request(_request("fits", _prompt(rng, 10)))
    run(engine)
    engine.add_request(_request("alone", _prompt(rng, 100)))
    run(engine)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt_token_ids": []}, "prompt", "no token"),
        ({"prompt_token_ids": [1, VOCAB_SIZE]}, "prompt", str(VOCAB_SIZE)),
        ({"prompt_token_ids": [1] * 256}, "prompt", "256"),
        (
            {"sampling": SamplingParams(logit_bias={1: 1.0, 900: 1.0, 999: 1.0})},
            "logit_bias",
            "999",
        ),
        ({"sampling": SamplingParams(stop_token_ids=[900])}, "stop_token_ids", "900"),
        ({"request_id": "known"}, "request_id", "known"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(
    fields: dict[str, Any], param: str, words: str
) -> None:
    engine, _ = _engine()
    engine.add_request(_request("known", [1]))
    with pytest.raises(RequestError, match=words) as caught:
        engine.add_request(_request(**{"name": "new", "prompt": [1], **fields}))
    assert caught.value.param == param
    run(engine)


def test_sizes_that_cannot_work_are_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 256.*hold 72"):
        _engine(num_blocks=10)
    with pytest.raises(ConfigError, match="num_window_blocks"):
        _engine("windows", num_window_blocks=3)
    engine, _ = _engine(num_state_slots=5, max_num_seqs=None)
    assert engine.plan.max_num_seqs == 4
    engine, _ = _engine(num_blocks=10, max_model_len=None)
    assert engine.max_model_len == 72


class _Storm:
    """Requests of all kinds that come and are aborted at random moments."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.merged: dict[str, TokenOutput] = {}
        self.aborted = 0
        self._engine, self._rng = engine, rng
        self._prompts = _family(rng, 40, 150)
        self._alive: list[str] = []
        self._reserved: list[str] = []
        self._started = 0

    def go_on(self) -> None:
        for _ in range(self._rng.randrange(8)):
            self._start(self._rng.choice(self._prompts))
        if self._rng.random() < 0.8:
            self._step()
        if self._reserved and self._rng.random() < 0.5:
            self._engine.cancel(self._reserved.pop())
        for _ in range(min(len(self._alive), self._rng.randrange(8))):
            self._engine.abort(self._alive.pop(self._rng.randrange(len(self._alive))))
            self.aborted += 1

    def end(self) -> None:
        for name in self._alive:
            self._engine.abort(name)
        for name in self._reserved:
            self._engine.cancel(name)
        while self._engine.has_work():
            self._step()

    def _start(self, prompt: list[int]) -> None:
        name, kind = str(self._started), self._rng.random()
        self._started += 1
        depth = len(prompt) // 8 * 8
        if kind < 0.2 and self._engine.reserve(name, prompt, depth) is not None:
            self._reserved.append(name)
        self._engine.add_request(_request(name, prompt, hand_over=kind > 0.8))
        self._alive.append(name)

    def _step(self) -> None:
        for output in self._engine.step().outputs:
            merge(self.merged, output)


@pytest.mark.parametrize("model", MODELS)
def test_a_thousand_aborts_at_random_moments_leave_no_unit_behind(
    model: str, rng: random.Random
) -> None:
    engine, history = _engine(
        model, num_blocks=60, num_window_blocks=40, num_state_slots=20, max_num_seqs=8
    )
    storm = _Storm(engine, rng)
    while storm.aborted < 1000:
        storm.go_on()
        if rng.random() < 0.1:
            engine.check_integrity()
    storm.end()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
    assert (stats.blocks_used, stats.window_blocks_used, stats.slots_used) == (0, 0, 0)
    assert {output.finish_reason for output in storm.merged.values()} <= {"abort", "length"}
    prompt = _prompt(rng, 100)
    output = run(engine, [_request("after", prompt)])["after"]
    assert output.token_ids == history.continuation(prompt, 16)


# Hand-over


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("caching", [True, False])
def test_a_handed_over_prompt_goes_on_with_the_same_tokens(
    model: str, caching: bool, rng: random.Random
) -> None:
    giver, history = _engine(model, enable_prefix_caching=caching)
    taker, _ = _engine(model, enable_prefix_caching=caching)
    for i, prompt in enumerate(_family(rng, 10, 200)):
        name = str(i)
        reservation = hand_over(giver, taker, name, prompt)
        depth = (len(prompt) - 1) // 8 * 8
        assert reservation.num_tokens == depth
        requests = [_request(f"{name}.{j}", prompt, prefix_id=name) for j in range(3)]
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


def test_spans_are_offered_chunk_by_chunk_and_the_state_comes_last(rng: random.Random) -> None:
    giver, _ = _engine("all")
    reports = compute_hand_over(giver, "one", _prompt(rng, 150))
    assert [report.num_tokens for report in reports] == [64, 128, 144]
    assert [report.complete for report in reports] == [False, False, True]
    pools = [[span.pool for span in report.spans] for report in reports]
    assert pools[0] == pools[1] == ["full"] * 8
    # 144 - 20 + 1 = 125 is the first token that token 144 sees: blocks 15 to 17.
    assert pools[2] == ["full", "full", "window", "window", "window", "state"]
    assert [s.ordinal for s in reports[2].spans if s.pool == "window"] == [15, 16, 17]
    used = giver.stats()
    assert (used.blocks_used, used.window_blocks_used, used.slots_used) == (18, 3, 1)
    again = compute_hand_over(giver, "two", [*_prompt(random.Random(0), 0), *range(5)])
    assert [(report.num_tokens, report.complete, report.spans) for report in again] == [
        (0, True, [])
    ]
    giver.release("one")
    giver.release("two")
    assert giver.stats().blocks_used == 0


def test_a_known_prompt_is_offered_at_once_without_a_step(rng: random.Random) -> None:
    giver, history = _engine("all")
    prompt = _prompt(rng, 150)
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


def test_only_missing_spans_are_wanted(rng: random.Random) -> None:
    giver, _ = _engine("all")
    taker, history = _engine("all")
    prompt = _prompt(rng, 150)
    run(taker, [_request("known", prompt[:100])])
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
    output = run(taker, [_request("goes on", prompt)])["goes on"]
    assert output.num_cached_tokens == 144
    assert output.token_ids == history.continuation(prompt, 16)


def test_a_reservation_without_room_holds_nothing(rng: random.Random) -> None:
    taker, _ = _engine(num_blocks=40, num_state_slots=8)
    assert taker.reserve("big", _prompt(rng, 250), 248) is not None
    assert taker.reserve("none left", _prompt(rng, 250), 248) is None
    taker.check_integrity()
    taker.cancel("big")
    taker.check_integrity()
    assert taker.stats().blocks_used == 0
    with pytest.raises(RequestError, match="multiple of 8"):
        taker.reserve("odd", _prompt(rng, 20), 12)
    with pytest.raises(RequestError, match="not reserved"):
        taker.commit("big")


def test_a_cancelled_reservation_leaves_nothing_to_find(rng: random.Random) -> None:
    taker, history = _engine()
    prompt = _prompt(rng, 100)
    taker.reserve("gone", prompt, 96)
    taker.cancel("gone")
    output = run(taker, [_request("alone", prompt, prefix_id="gone")])["alone"]
    assert (output.num_cached_tokens, output.token_ids) == (0, history.continuation(prompt, 16))


def test_pinned_prefixes_never_block_each_others_requests(rng: random.Random) -> None:
    giver, history = _engine(num_blocks=400)
    taker, _ = _engine(num_blocks=34, max_model_len=256, num_state_slots=12)
    prompts = {str(i): _prompt(rng, 129) for i in range(2)}
    for name, prompt in prompts.items():
        hand_over(giver, taker, name, prompt)
    filler = _prompt(rng, 8)
    assert taker.reserve("filler", filler, 8) is not None
    taker.commit("filler")
    assert taker.stats().blocks_used == 33
    outputs = run(taker, [_request(n, p, prefix_id=n) for n, p in prompts.items()])
    for name, prompt in prompts.items():
        assert outputs[name].token_ids == history.continuation(prompt, 16)


def test_a_hand_over_ended_early_reports_an_error_and_pins_nothing(rng: random.Random) -> None:
    giver, _ = _engine()
    giver.add_request(_request("cut", _prompt(rng, 150), hand_over=True))
    assert not giver.step().hand_overs[0].complete
    giver.abort("cut")
    (report,) = giver.step().hand_overs
    assert report.error == "The request was aborted."
    assert giver.stats().blocks_used == 0
    giver.check_integrity()


def test_generations_change_when_a_unit_is_given_out_again(rng: random.Random) -> None:
    giver, _ = _engine(num_blocks=34, num_state_slots=4, max_num_seqs=1)
    reports = compute_hand_over(giver, "one", _prompt(rng, 150))
    spans = [span for report in reports for span in report.spans]
    giver.release("one")
    assert all(giver.generation(s.pool, s.index) == s.generation for s in spans)
    run(giver, [_request(str(i), _prompt(rng, 200)) for i in range(4)])
    assert all(giver.generation(s.pool, s.index) > s.generation for s in spans)


def test_engines_of_one_layout_have_one_fingerprint() -> None:
    assert _engine()[0].fingerprint == _engine(num_blocks=100)[0].fingerprint
    assert _engine()[0].fingerprint != _engine(block_size=16)[0].fingerprint
    assert _engine()[0].fingerprint != _engine("dense")[0].fingerprint


def test_a_queue_behind_leases_stalls_without_work_and_goes_on_after_them(
    rng: random.Random,
) -> None:
    giver, history = _engine(num_blocks=34)
    compute_hand_over(giver, "leased", _prompt(rng, 200))
    prompt = _prompt(rng, 100)
    giver.add_request(_request("waits", prompt))
    for _ in range(3):
        result = giver.step()
        assert (result.outputs, result.hand_overs) == ([], [])
        assert giver.stalled
    giver.release("leased")
    assert run(giver)["waits"].token_ids == history.continuation(prompt, 16)
    assert not giver.stalled


def test_a_hand_over_that_cannot_grow_waits_for_the_window_blocks_of_leases(
    rng: random.Random,
) -> None:
    giver, _ = _engine("windows", num_window_blocks=9, max_num_seqs=1)
    prompts = [_prompt(rng, 200) for _ in range(3)]
    for i in range(2):
        compute_hand_over(giver, str(i), prompts[i])
    giver.add_request(_request("2", prompts[2], hand_over=True))
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
