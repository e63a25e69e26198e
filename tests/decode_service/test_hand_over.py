"""Tokens and log-probabilities that come through two real pods are those of transformers.

Left to the transfer's own tests: what each backend does with damaged bytes; to the engine's: all
families and chunk sizes.
"""

import random
from pathlib import Path

import httpx
import pytest
import tiny_models
import torch
from draw_margins import TRIES, is_settled
from greedy import is_greedy
from pods import PodProcess, generate, relay, running, until_idle

BLOCK = 16
TOLERANCE = 1e-4

pytestmark = pytest.mark.timeout(180)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(length)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)])
@pytest.mark.parametrize("family", ["granite_hybrid", "qwen3", "mistral", "nemotron_h"])
async def test_a_prompt_computed_elsewhere_gives_the_tokens_and_logprobs_of_transformers(
    family: str, backend: str, folders: Path, seed: int, client: httpx.AsyncClient
) -> None:
    rng = random.Random(seed)
    folder = tiny_models.make(family, folders, seed)
    pods = [
        PodProcess(
            role, folder, folders / f"{family}-{backend}-{role}.log", transfer_backends=backend
        )
        for role in ("prefill", "decode")
    ]
    with running(*pods) as (giver, taker):
        for length in (17, 33, 256, rng.randrange(100, 500)):
            prompt = random_prompt(rng, length)
            answer = await relay(client, giver, taker, prompt, max_tokens=12, logprobs=0)
            tokens = answer.tokens[0]
            assert is_greedy(folder, prompt, tokens), f"length {length}"
            table = tiny_models.reference_logprobs(folder, prompt + tokens)
            rows = table[len(prompt) - 1 : -1]
            reference = rows[torch.arange(12), torch.tensor(tokens)]
            got = [
                value
                for event in answer.events
                for value in event["choices"][0]["logprobs"]["token_logprobs"]
            ]
            assert (torch.tensor(got) - reference).abs().max() <= TOLERANCE
        assert taker.metric("tasuki_transfer_seconds_count") == 4
        assert taker.metric("tasuki_transfer_bytes_total", backend=backend) > 0
        assert taker.metric("tasuki_transfer_failures_total") == 0
        await until_idle(giver)
        await until_idle(taker)


async def test_a_seeded_sample_is_the_same_with_and_without_a_hand_over(
    prefill_pod: PodProcess,
    decode_pod: PodProcess,
    client: httpx.AsyncClient,
    model: Path,
    seed: int,
) -> None:
    rng = random.Random(seed + 1)
    options = {"temperature": 1.0, "top_p": 0.95, "n": 3, "seed": 11, "max_tokens": 20}
    for _ in range(TRIES):
        prompt = random_prompt(rng, 90)
        moved = await relay(client, prefill_pod, decode_pod, prompt, **options)
        if is_settled(model, prompt, moved.tokens, options):
            break
    local = await generate(client, decode_pod, prompt, cache_salt="another", **options)
    assert moved.tokens == local.tokens
    assert len({tuple(tokens) for tokens in moved.tokens.values()}) == 3
    assert moved.finished == {0, 1, 2}
    assert moved.usage is not None
    assert moved.usage.completion_tokens == 60


async def test_cached_tokens_are_those_that_no_pod_had_to_compute(
    prefill_pod: PodProcess, decode_pod: PodProcess, client: httpx.AsyncClient, seed: int
) -> None:
    prompt = random_prompt(random.Random(seed + 3), 10 * BLOCK + 5)
    cached = []
    for _ in range(2):
        answer = await relay(client, prefill_pod, decode_pod, prompt)
        assert answer.usage is not None
        cached.append(answer.usage.cached_tokens)
    assert cached == [0, 10 * BLOCK]
    local = await generate(client, decode_pod, prompt)
    assert local.usage is not None
    assert local.usage.cached_tokens == 10 * BLOCK


async def test_what_the_decode_pod_has_is_not_moved_again(
    prefill_pod: PodProcess, decode_pod: PodProcess, client: httpx.AsyncClient, seed: int
) -> None:
    rng = random.Random(seed + 2)
    prompt = random_prompt(rng, 10 * BLOCK + 1)

    async def moved(prompt: list[int]) -> float:
        before = decode_pod.metric("tasuki_transfer_bytes_total")
        await relay(client, prefill_pod, decode_pod, prompt)
        return decode_pod.metric("tasuki_transfer_bytes_total") - before

    first = await moved(prompt)
    longer = await moved(prompt + random_prompt(rng, 2 * BLOCK))
    other = await moved(random_prompt(rng, 5 * BLOCK + 1))
    block = (first - longer) / 8
    state = longer - 2 * block
    assert block > 0
    assert state > 0
    assert other == 5 * block + state
    assert await moved(prompt) == 0
