"""What is refused, with the field that is wrong, and how many may wait."""

import random
from typing import Any

import pytest
from history_engine import MakeEngine, make_request, random_prompt
from history_model import VOCAB_SIZE
from relay import run

from tasuki_common.errors import ConfigError, OverloadedError, RequestError
from tasuki_common.sampling import SamplingParams
from tasuki_engine import memory


def test_admission_ends_where_the_limits_are(make_engine: MakeEngine, rng: random.Random) -> None:
    engine, _ = make_engine(max_queued_requests=3, max_queued_tokens=50)
    for i in range(3):
        engine.add_request(make_request(str(i), random_prompt(rng, 10)))
    with pytest.raises(OverloadedError):
        engine.add_request(make_request("one too many", random_prompt(rng, 10)))
    engine.abort("0")
    with pytest.raises(OverloadedError):
        engine.add_request(make_request("too long", random_prompt(rng, 40)))
    engine.add_request(make_request("fits", random_prompt(rng, 10)))
    run(engine)
    engine.add_request(make_request("alone", random_prompt(rng, 100)))
    run(engine)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt_token_ids": []}, "prompt", "no token"),
        ({"prompt_token_ids": [1, VOCAB_SIZE]}, "prompt", str(VOCAB_SIZE)),
        ({"prompt_token_ids": [1, -3, VOCAB_SIZE]}, "prompt", "Token id -3"),
        ({"prompt_token_ids": [1, 2**31, -1]}, "prompt", str(2**31)),
        ({"output_token_ids": [1, VOCAB_SIZE]}, "prompt", str(VOCAB_SIZE)),
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
    fields: dict[str, Any], param: str, words: str, make_engine: MakeEngine
) -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("known", [1]))
    with pytest.raises(RequestError, match=words) as caught:
        engine.add_request(make_request(**{"name": "new", "prompt": [1], **fields}))
    assert caught.value.param == param
    run(engine)


def test_sizes_that_cannot_work_are_refused_at_start(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 256.*hold 72"):
        make_engine(num_blocks=10)
    with pytest.raises(ConfigError, match="num_window_blocks"):
        make_engine("windows", num_window_blocks=3)
    engine, _ = make_engine(num_state_slots=5, max_num_seqs=None)
    assert engine.plan.max_num_seqs == 4
    engine, _ = make_engine(num_blocks=10, max_model_len=None)
    assert engine.max_model_len == 72


def test_an_engine_without_memory_for_its_pools_is_refused_at_start(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CPU_BUDGET", 0)
    with pytest.raises(ConfigError, match=r"memory_share is 0\.9.*nothing"):
        make_engine(num_blocks=None)
    make_engine(num_blocks=40, num_state_slots=20)


def test_requests_that_give_up_behind_one_that_waits_are_forgotten(
    make_engine: MakeEngine, rng: random.Random
) -> None:
    engine, _ = make_engine(num_blocks=40)
    held = random_prompt(rng, 240)
    assert engine.reserve("held", held, 240) is not None
    engine.add_request(make_request("head", random_prompt(rng, 200)))
    for i in range(500):
        engine.add_request(make_request(f"r{i}", [1, 2, 3]))
        engine.abort(f"r{i}")
    assert len(engine._scheduler._waiting) < 100
    engine.cancel("held")
    assert run(engine)["head"].finish_reason == "length"
