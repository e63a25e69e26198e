"""What a prefill pod answers, beside the hand-overs that tests/decode_service proves."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import msgspec
import pytest
import tiny_models
from fresh_seed import fresh_seed
from pods import PodProcess, prefill, running, until_idle

from tasuki_common.messages import ModelCard, PrefillRequest
from tasuki_common.tokenizer import Tokenizer

BLOCK = 16

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodProcess]:
    folder = tmp_path_factory.mktemp("prefill")
    model = tiny_models.make("granite_hybrid", folder, fresh_seed())
    engine = {"num_blocks": 40, "num_state_slots": 6, "max_queued_requests": 4}
    flags = {"aliases": "small,smaller", "lease_seconds": 2.0}
    with running(PodProcess("prefill", model, folder / "prefill.log", engine=engine, **flags)) as (
        pod,
    ):
        yield pod


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60.0) as client:
        yield client


async def test_a_ticket_covers_all_full_blocks_but_leaves_a_token(
    pod: PodProcess, client: httpx.AsyncClient
) -> None:
    member = pod.member()
    for length in (BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 100):
        ticket = await prefill(client, pod, [7] * length)
        assert ticket.num_tokens == (length - 1) // BLOCK * BLOCK
        assert (ticket.pod, ticket.incarnation) == (member.pod, member.incarnation)
        assert ticket.fingerprint == member.fingerprint
    await until_idle(pod)


async def test_a_prompt_without_a_full_block_is_a_400(
    pod: PodProcess, client: httpx.AsyncClient
) -> None:
    for prompt in ([], [1], [1] * BLOCK):
        request = PrefillRequest(request_id="short", prompt_token_ids=prompt)
        response = await client.post(f"{pod.url}/prefill", content=msgspec.msgpack.encode(request))
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt_token_ids"


async def test_a_deadline_that_has_passed_is_a_504_and_leaves_nothing(
    pod: PodProcess, client: httpx.AsyncClient
) -> None:
    request = PrefillRequest(request_id="late", prompt_token_ids=[1] * 100, timeout=0.0)
    response = await client.post(f"{pod.url}/prefill", content=msgspec.msgpack.encode(request))
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "timeout_error"
    await until_idle(pod)


async def test_more_than_fits_is_answered_503_and_what_was_admitted_expires(
    pod: PodProcess, client: httpx.AsyncClient
) -> None:
    async def one(number: int) -> httpx.Response:
        prompt = [3 + (number * 7 + i) % 200 for i in range(300)]
        request = PrefillRequest(request_id=f"many-{number}", prompt_token_ids=prompt)
        return await client.post(f"{pod.url}/prefill", content=msgspec.msgpack.encode(request))

    responses = await asyncio.gather(*(one(number) for number in range(40)))
    assert {response.status_code for response in responses} == {200, 503}
    refused = [response for response in responses if response.status_code == 503]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in refused)
    assert refused[0].json()["error"]["type"] == "overloaded_error"
    await until_idle(pod, seconds=30)


async def test_card_and_member_say_what_a_gateway_needs(
    pod: PodProcess, client: httpx.AsyncClient
) -> None:
    response = await client.get(f"{pod.url}/card")
    card = msgspec.msgpack.decode(response.content, type=ModelCard)
    assert card.model == "tiny"
    assert Tokenizer.from_files(card.files).encode("a page")
    member = pod.member()
    assert (member.model, member.aliases) == ("tiny", ("small", "smaller"))
    assert member.role == "prefill"
    assert member.block_size == BLOCK
    assert not member.draining
    assert member.load.blocks_total > 0
    assert (await client.get(f"{pod.url}/health")).status_code == 200
    assert (await client.get(f"{pod.url}/ready")).status_code == 200
    assert (await client.get(f"{pod.url}/prefill")).status_code == 405
