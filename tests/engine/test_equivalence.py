"""The engine against transformers, in float32: the same tokens and log-probabilities on every path.

Tokens alone hide small losses, so each path is also compared by the log-probabilities of what it
chose, against one full recompute.
"""

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from draw_margins import SAFE, TRIES, draw_margin
from fresh_seed import fresh_seed
from relay import greedy, hand_over, run

from tasuki_engine import models
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.request import EngineRequest, TokenOutput

# Not the mixture of experts: where two experts stand at a tie, two right answers differ.
FAMILIES = tuple(family for family in tiny_models.FAMILIES if not family.endswith("moe"))
LENGTH = 64
BOUND = 1e-4
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 16,
    "checkpoint_interval": 32,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "max_model_len": 512,
    "num_blocks": 400,
    "num_window_blocks": 200,
    "num_state_slots": 60,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seed() -> int:
    return fresh_seed()


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, seed: int, tmp_path_factory: Any) -> Path:
    return tiny_models.make(request.param, tmp_path_factory.mktemp("tiny"), seed)


@functools.cache
def _model(folder: Path) -> models.Model:
    return models.load(EngineConfig(model=str(folder), dtype="float32"), progress=False)


def _engine(folder: Path, **settings: Any) -> Engine:
    return Engine(EngineConfig(model=str(folder), **(SIZES | settings)), _model(folder))


def _prompts(seed: int, count: int, longest: int = 300) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.randrange(1, longest) for _ in range(count)]
    return [[rng.randrange(3, 384) for _ in range(length)] for length in lengths]


def _request(name: str, prompt: list[int], **fields: Any) -> EngineRequest:
    sampling = greedy(LENGTH, logprobs=0)
    return EngineRequest(
        **{"request_id": name, "prompt_token_ids": prompt, "sampling": sampling} | fields
    )


def _check(folder: Path, prompt: list[int], output: TokenOutput) -> None:
    """Every token is transformers' choice (ties within the bound aside), and as likely as there."""
    assert len(output.token_ids) == LENGTH
    assert output.logprobs is not None
    tokens = torch.tensor(output.token_ids)
    reference = tiny_models.reference_logprobs(folder, prompt + output.token_ids)[len(prompt) - 1 :]
    chosen = reference[:LENGTH].gather(1, tokens[:, None])[:, 0]
    best = reference[:LENGTH].max(dim=1).values
    ours = torch.tensor([entry.token.logprob for entry in output.logprobs])
    behind, apart = best - chosen, (ours - chosen).abs()
    bound = torch.full_like(apart, BOUND)
    if torch.maximum(behind, apart).max() > BOUND:
        spread = tiny_models.reference_spread(folder, prompt + output.token_ids)
        bound = bound.maximum(4 * spread[len(prompt) - 1 :][:LENGTH])
    assert (behind <= bound).all(), "not the greedy token"
    assert (apart <= bound).all()


def test_alone_equals_transformers(folder: Path, seed: int) -> None:
    (prompt,) = _prompts(seed, 1)
    output = run(_engine(folder), [_request("alone", prompt)])["alone"]
    _check(folder, prompt, output)


@pytest.mark.parametrize("budget", [16, 64, 256])
def test_a_mixed_batch_of_16_equals_transformers(folder: Path, seed: int, budget: int) -> None:
    prompts = _prompts(seed + 1, 16)
    engine = _engine(folder, max_num_batched_tokens=budget)
    outputs = run(engine, [_request(str(i), prompt) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        _check(folder, prompt, outputs[str(i)])


@pytest.mark.parametrize("budget", [1, 7])
def test_small_chunks_equal_transformers(folder: Path, seed: int, budget: int) -> None:
    prompts = _prompts(seed + 2, 2, 120)
    engine = _engine(folder, max_num_batched_tokens=budget)
    outputs = run(engine, [_request(str(i), prompt) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        _check(folder, prompt, outputs[str(i)])


def test_a_preempted_batch_equals_transformers(folder: Path, seed: int) -> None:
    prompts = _prompts(seed + 3, 8, 100)
    engine = _engine(
        folder, num_blocks=22, num_window_blocks=14, num_state_slots=12, max_model_len=192
    )
    outputs = run(engine, [_request(str(i), prompt) for i, prompt in enumerate(prompts)])
    assert engine.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        _check(folder, prompt, outputs[str(i)])


def test_a_hit_of_every_depth_equals_transformers(folder: Path, seed: int) -> None:
    rng = random.Random(seed + 4)
    prompt = [rng.randrange(3, 384) for _ in range(200)]
    tail = _prompts(seed + 5, 1, 30)[0]
    depths = set()
    for cut in range(0, 200, 16):
        engine = _engine(folder)
        if cut:
            run(engine, [_request("first", prompt[: cut + 1])])
        output = run(engine, [_request("hit", prompt[: cut + 1] + tail)])["hit"]
        assert output.num_cached_tokens == cut
        depths.add(cut)
        _check(folder, prompt[: cut + 1] + tail, output)
    assert len(depths) == 13


@pytest.mark.parametrize("caching", [True, False])
def test_a_handed_over_prompt_equals_transformers(folder: Path, seed: int, caching: bool) -> None:
    giver = _engine(folder, max_num_batched_tokens=64, enable_prefix_caching=caching)
    taker = _engine(folder, enable_prefix_caching=caching)
    for i, prompt in enumerate(_prompts(seed + 6, 4)):
        hand_over(giver, taker, str(i), prompt)
        output = run(taker, [_request(str(i), prompt, prefix_id=str(i))])[str(i)]
        taker.cancel(str(i))
        assert output.num_cached_tokens == (len(prompt) - 1) // 16 * 16
        _check(folder, prompt, output)


def test_a_request_resumed_after_a_hand_over_equals_transformers(folder: Path, seed: int) -> None:
    for prompt in _prompts(seed + 7, TRIES):
        request = _request("whole", prompt)
        whole = run(_engine(folder), [request])["whole"]
        if draw_margin(folder, prompt, whole.token_ids, request.sampling) >= SAFE:
            break
    giver, taker = _engine(folder), _engine(folder)
    done = 23
    hand_over(giver, taker, "rest", prompt + whole.token_ids[:done])
    request = _request("rest", prompt, prefix_id="rest", output_token_ids=whole.token_ids[:done])
    rest = run(taker, [request])["rest"]
    assert rest.token_ids == whole.token_ids[done:]


def test_prompt_logprobs_equal_transformers(folder: Path, seed: int) -> None:
    (prompt,) = _prompts(seed + 8, 1)
    engine = _engine(folder, max_num_batched_tokens=48)
    params = greedy(0, prompt_logprobs=1)
    output = run(engine, [_request("score", prompt, sampling=params)])["score"]
    assert output.prompt_logprobs is not None
    reference = tiny_models.reference_logprobs(folder, prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        expected = reference[position - 1, prompt[position]].item()
        assert entry.token.logprob == pytest.approx(expected, abs=BOUND)
