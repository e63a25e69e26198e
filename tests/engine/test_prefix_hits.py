"""What of a prompt is found again, how much of it is shared, and what the index hears of it."""

import random

import pytest
from history_engine import MODELS, MakeEngine, family, make_request, random_prompt
from history_model import VOCAB_SIZE
from relay import greedy, hand_over, run

from tasuki_common.hashing import block_hashes, root_hash


@pytest.mark.parametrize(
    ("model", "depth"), [("dense", 144), ("hybrid", 128), ("windows", 144), ("all", 128)]
)
def test_the_hit_counter_moves_exactly_as_the_arithmetic_says(
    model: str, depth: int, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine(model)
    prompt = random_prompt(rng, 151)
    run(engine, [make_request("first", prompt)])
    assert engine.stats().prefix_hit_tokens == 0
    tail = [(prompt[150] + 1) % VOCAB_SIZE, *random_prompt(rng, 39)]  # not as "first" goes on
    outputs = run(engine, [make_request("longer", prompt[:150] + tail)])
    # Blocks reach to 144. A hybrid needs a state: the prompt's end, or a multiple of 32.
    at_prompt_end = 144
    deepest = {"dense": 144, "windows": 144}.get(model, at_prompt_end)
    assert outputs["longer"].num_cached_tokens == deepest
    outputs = run(engine, [make_request("branch", prompt[:140] + random_prompt(rng, 40))])
    branch = depth if depth == 128 else 136
    assert outputs["branch"].num_cached_tokens == branch
    stats = engine.stats()
    assert stats.prefix_hit_tokens == deepest + branch
    assert stats.prefix_query_tokens == 151 + 190 + 180


def test_a_branch_point_gets_a_checkpoint_once_it_is_seen(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine()
    shared = random_prompt(rng, 109)  # blocks reach to 104, regular checkpoints to 96
    prompts = [shared + random_prompt(rng, 30) for _ in range(3)]
    cached = [
        run(engine, [make_request(str(i), prompt)])[str(i)].num_cached_tokens
        for i, prompt in enumerate(prompts)
    ]
    assert cached == [0, 96, 104]


def test_blocks_known_beyond_the_state_are_shared_and_not_written(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, history = make_engine()
    shared = random_prompt(rng, 109)
    run(engine, [make_request("first", shared + random_prompt(rng, 30))])
    before = engine.stats().blocks_cached
    region = engine.regions()["full"].clone()
    generations = {unit: engine.generation("full", unit) for unit in range(1, 400)}
    tail = random_prompt(rng, 3)
    output = run(engine, [make_request("second", shared[:106] + tail, sampling=greedy(1))])[
        "second"
    ]
    assert output.token_ids == history.continuation(shared[:106] + tail, 1)
    assert engine.stats().blocks_cached == before
    kept = [u for u, g in generations.items() if g and engine.generation("full", u) == g]
    assert len(kept) >= 17
    assert (engine.regions()["full"][kept] == region[kept]).all()


def test_salts_separate_caches(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, _ = make_engine()
    prompt = random_prompt(rng, 100)
    cached = [
        run(engine, [make_request(str(i), prompt, cache_salt=salt)])[str(i)].num_cached_tokens
        for i, salt in enumerate(["a", "b", "a", None])
    ]
    assert cached == [0, 0, 96, 0]


@pytest.mark.parametrize("model", MODELS)
def test_without_prefix_caching_nothing_is_kept(
    model: str, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine(model, enable_prefix_caching=False)
    prompt = random_prompt(rng, 100)
    for i in range(2):
        assert run(engine, [make_request(str(i), prompt)])[str(i)].num_cached_tokens == 0
    stats = engine.stats()
    assert (stats.blocks_cached, stats.slots_cached, stats.prefix_query_tokens) == (0, 0, 0)
    assert engine.take_cache_events() == []


def test_cache_events_say_what_can_be_found(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, _ = make_engine(num_blocks=40, num_state_slots=20, max_num_seqs=4)
    findable: set[tuple[str, bytes]] = set()
    for i in range(12):
        run(engine, [make_request(str(i), prompt) for i, prompt in enumerate(family(rng, 3, 120))])
        for event in engine.take_cache_events():
            key = (event.kind, event.hash)
            assert event.stored != (key in findable)
            (findable.add if event.stored else findable.remove)(key)
    stats = engine.stats()
    assert sum(kind == "block" for kind, _ in findable) == stats.blocks_cached
    assert sum(kind == "checkpoint" for kind, _ in findable) == stats.slots_cached


@pytest.mark.parametrize("imported", [False, True])
def test_cache_events_name_the_block_before_each_block(
    imported: bool, make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine()
    prompt = random_prompt(rng, 100)
    if imported:
        giver, _ = make_engine()
        hand_over(giver, engine, "p", prompt)
    else:
        run(engine, [make_request("r", prompt)])
    parents = {e.hash: e.parent for e in engine.take_cache_events() if e.kind == "block"}
    root = root_hash(engine.config.hash_algorithm, engine.hash_revision)
    names = block_hashes(engine.config.hash_algorithm, root, prompt, engine.config.block_size)
    assert [parents[name] for name in names] == [b"", *names[:-1]]
