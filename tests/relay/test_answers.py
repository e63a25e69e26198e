"""An OpenAI client gets through gateway, prefill and decode pods what transformers computes.

Left to the engine's tests: all families, chunk sizes, preemption; to the gateway's: the shapes of
all fields and errors.
"""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from draw_margins import SAFE, TRIES, greedy_margin, settled_prompt
from openai import AsyncOpenAI
from relays import Relay, running
from transformers import AutoTokenizer

NUM_TOKENS = 24
TOLERANCE = 1e-4
EXTRA = {"ignore_eos": True, "return_token_ids": True}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", params=["granite_hybrid", "qwen3", "mistral"])
def family_relay(request: pytest.FixtureRequest, folders: Path, seed: int) -> Iterator[Relay]:
    """A relay of a hybrid, of a dense model, of one with a sliding window."""
    if request.param == "granite_hybrid":
        yield request.getfixturevalue("relay")
        return
    model = tiny_models.make(request.param, folders, seed)
    with running(Relay(folders / request.param, model)) as relay:
        yield relay


@pytest.fixture
async def sdk(family_relay: Relay) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{family_relay.url}/v1", api_key="-", max_retries=0) as sdk:
        yield sdk


class Reference:
    """What transformers says of one prompt and the tokens that came for it."""

    def __init__(self, model: Path, prompt: list[int], tokens: list[int]) -> None:
        self.table = tiny_models.reference_logprobs(model, prompt + tokens)[len(prompt) - 1 : -1]
        self.greedy = self.table.argmax(dim=-1).tolist()
        """Equal to `tokens` if and only if these are the greedy ones."""
        self.logprobs = self.table[torch.arange(len(tokens)), torch.tensor(tokens)]
        self.text = AutoTokenizer.from_pretrained(model).decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def check_logprobs(self, got: list[float]) -> None:
        assert (torch.tensor(got) - self.logprobs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
async def test_completions_have_the_tokens_and_logprobs_of_transformers(
    family_relay: Relay, sdk: AsyncOpenAI, transport: str, rng: random.Random
) -> None:
    for length in (1, 17, 32, 33, rng.randrange(100, 400)):
        prompt = settled_prompt(rng, family_relay.model, length, NUM_TOKENS)
        options = {
            "model": f"through-{transport}",
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": NUM_TOKENS,
            "logprobs": 0,
            "extra_body": EXTRA,
        }
        whole = await sdk.completions.create(**options)
        expected = Reference(family_relay.model, prompt, whole.choices[0].token_ids)
        assert whole.choices[0].token_ids == expected.greedy, f"length {length}"
        assert whole.choices[0].text == expected.text
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens == length
        assert whole.usage.completion_tokens == NUM_TOKENS
        expected.check_logprobs(whole.choices[0].logprobs.token_logprobs)

        text, tokens, logprobs = "", [], []
        async for chunk in await sdk.completions.create(**options, stream=True):
            text += chunk.choices[0].text
            tokens += chunk.choices[0].token_ids
            logprobs += chunk.choices[0].logprobs.token_logprobs
        assert (text, tokens) == (expected.text, expected.greedy)
        expected.check_logprobs(logprobs)


async def test_prompts_were_computed_by_the_prefill_pod(family_relay: Relay) -> None:
    taken = [pod.metric("tasuki_transfer_seconds_count") for pod in family_relay.decode]
    assert min(taken) >= 3
    assert family_relay.decode_metric("tasuki_transfer_failures_total") == 0
    for pod, backend in zip(family_relay.decode, ("tcp", "nixl"), strict=True):
        assert pod.metric("tasuki_transfer_bytes_total", backend=backend) > 0


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
async def test_chats_have_the_tokens_and_logprobs_of_transformers(
    family_relay: Relay, sdk: AsyncOpenAI, transport: str, rng: random.Random
) -> None:
    words = ["page", "state", "block", "name", "table", "relay", "prompt"]
    tokenizer = AutoTokenizer.from_pretrained(family_relay.model)
    for _ in range(TRIES):
        question = " ".join(rng.choice(words) for _ in range(rng.randrange(10, 60)))
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        if greedy_margin(family_relay.model, prompt, NUM_TOKENS) >= SAFE:
            break
    options = {
        "model": f"through-{transport}",
        "messages": messages,
        "temperature": 0,
        "max_completion_tokens": NUM_TOKENS,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": EXTRA,
    }
    whole = await sdk.chat.completions.create(**options)
    tokens = whole.choices[0].token_ids
    assert len(tokens) == NUM_TOKENS
    expected = Reference(family_relay.model, prompt, tokens)
    assert tokens == expected.greedy
    assert whole.choices[0].message.content == expected.text
    assert whole.usage.prompt_tokens == len(prompt)
    expected.check_logprobs([entry.logprob for entry in whole.choices[0].logprobs.content])
    assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)

    text, logprobs, usage = "", [], None
    stream = await sdk.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.logprobs:
                logprobs += [entry.logprob for entry in choice.logprobs.content]
    assert text == expected.text
    expected.check_logprobs(logprobs)
    assert usage.completion_tokens == NUM_TOKENS
