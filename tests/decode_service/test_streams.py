"""What a stream of frames says: shapes of chunks, resumption, cancellation, deadlines."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from draw_margins import TRIES, is_settled
from fresh_seed import fresh_seed
from pods import (
    Answer,
    PodProcess,
    generate,
    generate_request,
    post_and_leave,
    prefill,
    stream,
    until_idle,
)

from tasuki_common.frames import Frame, Kind
from tasuki_common.messages import ResumedChoice
from tasuki_common.tokenizer import Tokenizer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(70)]


async def settled(
    client: httpx.AsyncClient, pod: PodProcess, model: Path, rng: random.Random, **options: Any
) -> tuple[list[int], Answer]:
    """A prompt and its answer, which is the same in any batch."""
    for _ in range(TRIES):
        prompt = [rng.randrange(3, 250) for _ in range(70)]
        answer = await generate(client, pod, prompt, **options)
        if is_settled(model, prompt, answer.tokens, {"seed": 7, **options}):
            break
    return prompt, answer


def collect(frames: list[Frame]) -> Answer:
    answer = Answer()
    for frame in frames:
        answer.add(frame)
    return answer


def rounded(value: Any) -> Any:
    """`value` with log-probabilities as near to each other as another batch leaves them."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


async def test_a_completion_is_one_finish_reason_and_the_text_of_its_tokens(
    client: httpx.AsyncClient, decode_pod: PodProcess, model: Path, prompt: list[int]
) -> None:
    answer = await generate(client, decode_pod, prompt, max_tokens=30)
    tokenizer = Tokenizer.from_folder(model)
    assert answer.text() == tokenizer.decode(answer.tokens[0])
    assert answer.finish_reasons() == ["length"]
    assert answer.events[-1]["choices"][0]["finish_reason"] == "length"
    assert {event["object"] for event in answer.events} == {"text_completion"}
    assert not any("usage" in event for event in answer.events)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (70, 30)


async def test_chat_begins_with_the_role_and_says_it_once(
    client: httpx.AsyncClient, decode_pod: PodProcess, prompt: list[int]
) -> None:
    answer = await generate(
        client, decode_pod, prompt, endpoint="chat", n=2, temperature=1.0, return_token_ids=True
    )
    for index in (0, 1):
        deltas = [e["choices"][0] for e in answer.events if e["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in entry["delta"] for entry in deltas[1:])
        ids = [token for entry in deltas[1:] for token in entry["token_ids"]]
        assert ids == answer.tokens[index]
    assert [event.get("prompt_token_ids") for event in answer.events].count(prompt) == 1
    assert answer.events[0]["prompt_token_ids"] == prompt


async def test_completion_logprobs_hold_one_entry_a_token_at_its_offset(
    client: httpx.AsyncClient, decode_pod: PodProcess, model: Path, prompt: list[int]
) -> None:
    answer = await generate(client, decode_pod, prompt, logprobs=3, max_tokens=20)
    lists: dict[str, list[Any]] = {}
    for event in answer.events:
        for name, values in event["choices"][0]["logprobs"].items():
            lists.setdefault(name, []).extend(values)
    assert {len(values) for values in lists.values()} == {20}
    assert all(3 <= len(top) <= 4 or len(set(top)) < 3 for top in lists["top_logprobs"])
    assert lists["text_offset"] == sorted(lists["text_offset"])
    tokenizer = Tokenizer.from_folder(model)
    assert lists["tokens"] == [tokenizer.token_text(token) for token in answer.tokens[0]]


async def test_chat_logprobs_name_tokens_bytes_and_alternatives(
    client: httpx.AsyncClient, decode_pod: PodProcess, model: Path, prompt: list[int]
) -> None:
    answer = await generate(
        client,
        decode_pod,
        prompt,
        endpoint="chat",
        logprobs=2,
        return_tokens_as_token_ids=True,
        skip_special_tokens=False,
    )
    entries = [
        entry
        for event in answer.events
        if (logprobs := event["choices"][0]["logprobs"])
        for entry in logprobs["content"]
    ]
    assert [entry["token"] for entry in entries] == [f"token_id:{t}" for t in answer.tokens[0]]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    spoken = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert spoken.decode(errors="replace") == answer.text()


async def test_echo_scores_the_prompt_without_generating(
    client: httpx.AsyncClient, decode_pod: PodProcess, model: Path, prompt: list[int]
) -> None:
    answer = await generate(
        client,
        decode_pod,
        prompt,
        echo=True,
        logprobs=1,
        prompt_logprobs=1,
        max_tokens=0,
    )
    (choice,) = [choice for event in answer.events for choice in event["choices"]]
    assert choice["text"] == Tokenizer.from_folder(model).decode(prompt)
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert {len(values) for values in logprobs.values()} == {len(prompt)}


async def test_echo_goes_before_the_first_tokens(
    client: httpx.AsyncClient, decode_pod: PodProcess, model: Path, prompt: list[int]
) -> None:
    answer = await generate(
        client, decode_pod, prompt, echo=True, logprobs=0, prompt_logprobs=0, max_tokens=5
    )
    tokenizer = Tokenizer.from_folder(model)
    assert answer.text() == tokenizer.decode(prompt) + tokenizer.decode(answer.tokens[0])
    tokens = [t for event in answer.events for t in event["choices"][0]["logprobs"]["tokens"]]
    assert tokens == [tokenizer.token_text(token) for token in prompt + answer.tokens[0]]


async def test_continuous_usage_counts_the_tokens_sent_so_far(
    client: httpx.AsyncClient, decode_pod: PodProcess, prompt: list[int]
) -> None:
    answer = await generate(client, decode_pod, prompt, continuous_usage=True)
    counts = [event["usage"]["completion_tokens"] for event in answer.events]
    assert counts == sorted(counts)
    assert counts[-1] == 16
    assert all(event["usage"]["prompt_tokens"] == 70 for event in answer.events)


@pytest.mark.parametrize("keep_stop", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_stream_resumed_after_any_frame_says_exactly_the_rest(
    temperature: float,
    keep_stop: bool,
    client: httpx.AsyncClient,
    decode_pod: PodProcess,
    model: Path,
    rng: random.Random,
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": 40, "logprobs": 1}
    prompt, free = await settled(client, decode_pod, model, rng, **options)
    middle = len(free.text()) * 2 // 3
    options["stop"] = [free.text()[middle : middle + 4], "never said"]
    options["include_stop_str_in_output"] = keep_stop
    whole = await generate(client, decode_pod, prompt, **options)
    frames = [frame for frame in whole.frames if frame.kind is not Kind.DONE]
    assert whole.finish_reasons() == ["stop"]
    assert whole.text() in free.text()
    expected = rounded(whole.events)
    for split in range(len(frames)):
        begun = collect(frames[:split])
        resume = (ResumedChoice(token_ids=begun.tokens.get(0, [])),)
        rest = await generate(client, decode_pod, prompt, resume=resume, **options)
        assert begun.tokens.get(0, []) + rest.tokens[0] == whole.tokens[0], f"split {split}"
        assert begun.text() + rest.text() == whole.text(), f"split {split}"
        assert [*begun.events, *rest.events] == expected, f"split {split}"
        assert rest.usage is not None
        assert rest.usage.completion_tokens == len(whole.tokens[0])


async def test_choices_that_were_finished_are_not_generated_again(
    client: httpx.AsyncClient, decode_pod: PodProcess, model: Path, rng: random.Random
) -> None:
    options = {"n": 3, "temperature": 1.0, "max_tokens": 8}
    prompt, whole = await settled(client, decode_pod, model, rng, **options)
    resume = (
        ResumedChoice(token_ids=whole.tokens[0], finished=True),
        ResumedChoice(token_ids=whole.tokens[1][:3]),
        ResumedChoice(token_ids=[]),
    )
    rest = await generate(client, decode_pod, prompt, resume=resume, **options)
    assert rest.tokens == {1: whole.tokens[1][3:], 2: whole.tokens[2]}
    assert rest.usage is not None
    assert rest.usage.completion_tokens == 24


async def test_cached_tokens_of_many_choices_are_those_before_the_first(
    client: httpx.AsyncClient, decode_pod: PodProcess
) -> None:
    rng = random.Random(fresh_seed())
    prompt = [rng.randrange(3, 250) for _ in range(200)]
    answer = await generate(client, decode_pod, prompt, n=40, max_tokens=1, cache_salt="many")
    assert answer.usage is not None
    assert answer.usage.cached_tokens == 0


async def test_a_resumed_choice_does_not_score_its_prompt_again(
    client: httpx.AsyncClient, decode_pod: PodProcess
) -> None:
    rng = random.Random(fresh_seed())
    prompt = [rng.randrange(3, 250) for _ in range(200)]
    options = {"prompt_logprobs": 1, "max_tokens": 6}
    whole = await generate(client, decode_pod, prompt, **options)
    before = decode_pod.metric("tasuki_prompt_tokens_computed_total")
    resume = (ResumedChoice(token_ids=whole.tokens[0][:3]),)
    rest = await generate(client, decode_pod, prompt, resume=resume, **options)
    assert rest.tokens[0] == whole.tokens[0][3:]
    await until_idle(decode_pod)
    assert decode_pod.metric("tasuki_prompt_tokens_computed_total") - before < 16


async def test_a_deadline_ends_the_stream_with_an_error(
    client: httpx.AsyncClient, decode_pod: PodProcess, prompt: list[int]
) -> None:
    answer = await generate(client, decode_pod, prompt, max_tokens=3000, timeout=1.5)
    assert answer.error is not None
    assert answer.error["kind"] is Kind.ERROR
    assert answer.error["type"] == "timeout_error"
    assert decode_pod.metric("tasuki_requests_total", outcome="deadline") >= 1
    await until_idle(decode_pod)


async def test_delete_ends_a_stream_with_an_error(
    client: httpx.AsyncClient, decode_pod: PodProcess, prompt: list[int]
) -> None:
    request = generate_request(prompt, max_tokens=1500)
    answer = Answer()
    async for frame in stream(client, decode_pod, request):
        if not answer.frames:
            deleted = await client.delete(f"{decode_pod.url}/requests/{request.request_id}")
            assert deleted.status_code == 204
        answer.add(frame)
    assert answer.error is not None
    assert answer.usage is None
    assert decode_pod.metric("tasuki_requests_total", outcome="cancelled") >= 1
    await until_idle(decode_pod)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"logit_bias": {5: 1.0, 99999: 1.0}}, "logit_bias"),
        ({"resume": (ResumedChoice(token_ids=[]),) * 2}, "resume"),
    ],
)
async def test_what_the_engine_refuses_is_a_400_that_names_the_field(
    options: dict[str, Any],
    param: str,
    client: httpx.AsyncClient,
    decode_pod: PodProcess,
    prompt: list[int],
) -> None:
    body = msgspec.msgpack.encode(generate_request(prompt, **options))
    response = await client.post(f"{decode_pod.url}/generate", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_body_that_is_no_message_is_a_400(
    client: httpx.AsyncClient, decode_pod: PodProcess, prefill_pod: PodProcess
) -> None:
    for url in (f"{decode_pod.url}/generate", f"{prefill_pod.url}/prefill"):
        for body in (b"", b"\x00", b"\x81\xa1a\x01", os.urandom(200)):
            assert (await client.post(url, content=body)).status_code == 400


@pytest.mark.slow
@pytest.mark.timeout(300)  # three times it waits for leases of 30 s to run out
async def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    prefill_pod: PodProcess, decode_pod: PodProcess, seed: int
) -> None:
    rng = random.Random(seed)
    pids = [pod.process.pid for pod in (prefill_pod, decode_pod)]
    pids += [pod.engine_pid() for pod in (prefill_pod, decode_pod)]

    async def leave_early(client: httpx.AsyncClient) -> None:
        prompt = [rng.randrange(3, 250) for _ in range(rng.randrange(20, 400))]
        ticket = await prefill(client, prefill_pod, prompt) if rng.random() < 0.5 else None
        request = generate_request(prompt, ticket=ticket, n=rng.choice([1, 1, 3]), max_tokens=500)
        await post_and_leave(decode_pod, request, seconds=rng.random() ** 2)

    async def round_of(count: int) -> list[tuple[int, int]]:
        async with httpx.AsyncClient(timeout=60.0) as client:  # it keeps no connection open
            await asyncio.gather(*(leave_early(client) for _ in range(count)))
        await until_idle(decode_pod, seconds=25)
        await until_idle(prefill_pod, seconds=80)
        await asyncio.sleep(0.5)
        return [
            (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))
            for pid in pids
        ]

    baseline = await round_of(30)
    for _ in range(2):
        after = await round_of(50)
    for (files, threads), (files_before, threads_before) in zip(after, baseline, strict=True):
        assert files <= files_before + 4, "file descriptors stay open"
        assert threads <= threads_before + 8, "more than the pools of threads may grow"


async def test_tokens_made_for_another_model_are_refused(
    client: httpx.AsyncClient, decode_pod: PodProcess, prompt: list[int]
) -> None:
    with pytest.raises(AssertionError, match=r"503: .*serves .* not another one's"):
        await generate(client, decode_pod, prompt, fingerprint="another one's")
