"""A pod that dies, or is silent too long, costs time and never a token.

Left to the pods' own tests: a flipped byte, a cut transfer, tickets of another model or prompt; to
the gateway's: a stream that is cut at any byte.
"""

import asyncio
import random
import signal
from typing import Any

import httpx
import pytest
from draw_margins import TRIES, is_settled
from greedy import is_greedy, random_prompt
from relays import Relay, Stream, body, complete, events, log_lines, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

NUM_TOKENS = 200
BALLAST = 8
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 0},
    "sampled": SAMPLED,
    "two": {**SAMPLED, "n": 2, "logprobs": 2},
    "penalized": {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    "stopped": SAMPLED,
}


class Following:
    """A stream that is being read in the background."""

    def __init__(
        self, client: httpx.AsyncClient, relay: Relay, request: dict[str, Any], name: str
    ) -> None:
        self.stream = Stream()
        self.task = asyncio.ensure_future(self._follow(client, relay, request, name))

    async def _follow(
        self, client: httpx.AsyncClient, relay: Relay, request: dict[str, Any], name: str
    ) -> Stream:
        headers = {"x-request-id": name}
        async for _ in events(client, relay, request, self.stream, headers):
            pass
        return self.stream

    async def has(self, count: int) -> None:
        """Until so many tokens of each begun choice are here."""
        async with asyncio.timeout(60):
            while not self.stream.tokens or min(map(len, self.stream.tokens.values())) < count:
                assert not self.task.done(), self.stream
                await asyncio.sleep(0.002)


def stop_string(text: str) -> str:
    """Some characters that come late in a text, and not before."""
    for start in range(len(text) * 4 // 5, len(text) - 4):
        wanted = text[start : start + 4]
        if text.find(wanted) == start and "\ufffd" not in wanted:
            return wanted
    raise AssertionError(f"no four characters are new in the end of {text!r}")


async def alone(
    client: httpx.AsyncClient, relay: Relay, prompt: list[int]
) -> tuple[dict[str, dict[str, Any]], dict[str, Stream]]:
    """The request of each variant, and its answer, one after the other."""
    requests = {
        name: body(prompt, max_tokens=NUM_TOKENS, **options) for name, options in VARIANTS.items()
    }
    answers: dict[str, Stream] = {}
    for name, request in requests.items():
        if name == "stopped":
            request["stop"] = [stop_string(answers["sampled"].text[0])]
        answers[name] = await Following(client, relay, request, name).task
        assert answers[name].whole
    return requests, answers


async def test_a_decode_pod_killed_in_mid_stream_leaves_no_trace_in_the_text(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    for _ in range(TRIES):
        prompt = random_prompt(rng, 150)
        requests, expectations = await alone(client, mistreated, prompt)
        if all(
            is_settled(mistreated.model, prompt, expectations[name].tokens, request)
            for name, request in requests.items()
        ):
            break
    else:
        pytest.fail(f"each of {TRIES} prompts has a token that rounding decides")
    assert expectations["stopped"].finish[0] == "stop"
    assert len(expectations["stopped"].tokens[0]) > NUM_TOKENS // 2

    ballast_request = body(prompt[:20], model="through-tcp", max_tokens=1500)
    ballast = [Following(client, mistreated, ballast_request, "ballast") for _ in range(BALLAST)]
    for one in ballast:
        await one.has(1)
    following = {
        name: Following(client, mistreated, request, f"killed-{name}")
        for name, request in requests.items()
    }
    for one in following.values():
        await one.has(20)
    mistreated.decode[1].kill()
    for name, one in following.items():
        stream, expected = await one.task, expectations[name]
        assert stream.whole, stream.error
        assert stream.text == expected.text, name
        assert stream.tokens == expected.tokens, name
        assert stream.finish == expected.finish, name
        assert stream.usage is not None
        assert expected.usage is not None
        assert stream.usage["completion_tokens"] == expected.usage["completion_tokens"]
        for index, logprobs in expected.logprobs.items():
            assert stream.logprobs[index] == pytest.approx(logprobs, abs=1e-4)
    assert is_greedy(mistreated.model, prompt, following["greedy"].stream.tokens[0])
    lost = [e for e in log_lines(mistreated.gateway_log) if e["event"] == "failover"]
    names = {e["request_id"].split(".")[0] for e in lost}
    assert {n for n in names if n.startswith("killed-")} == {f"killed-{n}" for n in VARIANTS}
    assert mistreated.metric("tasuki_gateway_failovers_total", reason="cut") == len(VARIANTS)
    for one in ballast:
        one.task.cancel()
    await asyncio.gather(*(one.task for one in ballast), return_exceptions=True)


async def test_a_prefill_pod_killed_in_mid_prompt_costs_a_recomputation(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    (giver,) = mistreated.prefill
    before = mistreated.decode_metric("tasuki_transfer_failures_total")
    prompt = random_prompt(rng, 1500)
    one = Following(client, mistreated, body(prompt), "mid-prompt")
    until_running = asyncio.to_thread(
        until, lambda: giver.metric("tasuki_requests_running") == 1, 20.0, "nothing is prefilled"
    )
    await until_running
    giver.kill()
    stream = await one.task
    assert stream.whole, stream.error
    assert is_greedy(mistreated.model, prompt, stream.tokens[0])
    assert mistreated.decode_metric("tasuki_transfer_failures_total") == before + 1
    assert mistreated.metric("tasuki_gateway_prefill_leg_failures_total") == 0

    taken = mistreated.decode_metric("tasuki_transfer_seconds_count")
    prompt = random_prompt(rng, 100)
    stream = await complete(client, mistreated, prompt)
    assert is_greedy(mistreated.model, prompt, stream.tokens[0])
    assert mistreated.decode_metric("tasuki_transfer_seconds_count") == taken
    await asyncio.to_thread(mistreated.heal)
    prompt = random_prompt(rng, 100)
    stream = await complete(client, mistreated, prompt)
    assert is_greedy(mistreated.model, prompt, stream.tokens[0])
    assert mistreated.decode_metric("tasuki_transfer_seconds_count") == taken + 1


async def test_a_lease_that_ran_out_costs_a_recomputation(
    mistreated: Relay, client: httpx.AsyncClient, rng: random.Random
) -> None:
    (giver,), taker = mistreated.prefill, mistreated.decode[0]
    before = taker.metric("tasuki_transfer_failures_total", reason="expired")
    expired = giver.metric("tasuki_leases_ended_total", outcome="expired")
    engine = mistreated.processes()["decode-0 engine"]
    prompt = random_prompt(rng, 200)
    engine.send_signal(signal.SIGSTOP)
    try:
        one = Following(client, mistreated, body(prompt, model="through-tcp"), "expired")
        await asyncio.to_thread(
            until,
            lambda: giver.metric("tasuki_leases_ended_total", outcome="expired") > expired,
            60.0,
            "no lease ran out",
        )
    finally:
        engine.send_signal(signal.SIGCONT)
    stream = await one.task
    assert stream.whole, stream.error
    assert is_greedy(mistreated.model, prompt, stream.tokens[0])
    assert taker.metric("tasuki_transfer_failures_total", reason="expired") == before + 1
    mistreated.until_idle()
