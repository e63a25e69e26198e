"""A decode pod that is lost at any moment costs the client nothing but a pause."""

import argparse
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_pods import FakePod, tokenizer_json
from gateway_stack import Stack, Starter

from tasuki_common.frames import Decoder, Kind
from tasuki_common.messages import GenerateRequest
from tasuki_common.sampling import SamplingParams

ASKED: dict[str, Any] = {"prompt": "fox", "max_tokens": 12, "seed": 5, "stream": True}


def texts(body: str, n: int = 1) -> list[str]:
    """The text of each choice of a stream that ended well."""
    assert body.endswith("data: [DONE]\n\n")
    merged, finished = [""] * n, [0] * n
    for line in body.split("\n\n")[:-2]:
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        for choice in event["choices"]:
            delta = choice.get("delta") or {"content": choice.get("text")}
            merged[choice["index"]] += delta["content"]
            finished[choice["index"]] += choice["finish_reason"] is not None
    assert finished == [1] * n
    return merged


def ask(stack: Stack, path: str = "/v1/completions", **fields: Any) -> str:
    """The body of a stream."""
    response = stack.client.post(path, json=ASKED | fields)
    assert response.status_code == 200, response.text
    return response.text


def frame_ends(stack: Stack, **fields: Any) -> list[int]:
    """Where the frames end in the stream of the request, in bytes."""
    options = argparse.Namespace(
        role="decode", name="x", fingerprint="f1", tokenizer="", policy="{}"
    )
    pod = FakePod(options, 1)
    asked = ASKED | fields
    request = GenerateRequest(
        request_id="x",
        model="fake",
        endpoint="completion",
        response_id="cmpl-" + "0" * 32,
        created=int(time.time()),
        prompt_token_ids=pod.tokenizer.encode(asked["prompt"]),
        sampling=SamplingParams(
            n=asked.get("n", 1), max_tokens=asked["max_tokens"], seed=asked["seed"]
        ),
    )
    ends, total = [], 0
    for frame in pod._answer(request):
        total += len(frame)
        assert Decoder().feed(frame)[0].kind in Kind
        ends.append(total)
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_cut_anywhere_goes_on_without_gap_or_double(stack: Stack, n: int) -> None:
    expected = texts(ask(stack, n=n), n)
    ends = frame_ends(stack, n=n)
    cuts = sorted({0, 1, *ends, *(end - 1 for end in ends), *(end - 40 for end in ends)})
    for cut in cuts:
        stack.fault(times=1, cut_after=cut)
        assert texts(ask(stack, n=n), n) == expected, f"cut after {cut} bytes"
        stack.fault()
    assert stack.metric('tasuki_gateway_failovers_total{reason="cut"}') >= len(cuts)


def test_chats_role_is_said_once_wherever_the_cut_is(stack: Stack) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "prompt": None}
    expected = texts(ask(stack, "/v1/chat/completions", **chat))
    for cut in (10, 200, 230, 250, 500, 700):
        stack.fault(times=1, cut_after=cut)
        body = ask(stack, "/v1/chat/completions", **chat)
        assert texts(body) == expected
        assert body.count('"role":"assistant"') == 1
        assert body.index('"role"') < body.index('"content":"', body.index('"role"') + 40)


def test_a_response_that_does_not_stream_fails_over_too(stack: Stack) -> None:
    expected = stack.client.post("/v1/completions", json=ASKED | {"stream": False}).json()
    stack.fault(times=1, cut_after=900)
    again = stack.client.post("/v1/completions", json=ASKED | {"stream": False}).json()
    assert again["choices"] == expected["choices"]
    assert again["usage"] == expected["usage"]


def test_a_pod_that_says_retry_is_left(stack: Stack) -> None:
    expected = texts(ask(stack))
    for frames in (0, 1, 5):
        stack.decode[0].fault(times=1, kind=4, frames=frames)
        for _ in range(4):
            assert texts(ask(stack)) == expected


def test_what_came_with_a_frame_that_is_none_is_not_lost(stack: Stack) -> None:
    expected = texts(ask(stack))
    for number in (0, 1, 5):
        stack.fault(times=1, stray_after=number)
        assert texts(ask(stack)) == expected
        stack.fault()


def test_the_next_pod_gets_prompt_and_journal(stack: Stack) -> None:
    stack.fault(times=1, kind=4, frames=7)
    ask(stack)
    seen = [event for pod in stack.decode for event in pod.call("/seen")["seen"]]
    assert [7] in [event.get("resume") for event in seen]


@pytest.mark.slow
def test_a_stream_waits_when_the_pods_that_are_left_are_busy(start: Starter) -> None:
    stack = start()
    expected = texts(ask(stack))
    survivor, lost = stack.decode
    survivor.fault(times=10**6, status=503)
    lost.fault(times=1, cut_after=900)

    def die_and_make_room() -> None:
        while stack.metric("tasuki_gateway_failovers_total") == 0:
            time.sleep(0.01)
        lost.kill()
        time.sleep(2.5)
        survivor.fault()

    thread = threading.Thread(target=die_and_make_room)
    thread.start()
    assert texts(ask(stack)) == expected
    thread.join()


def test_a_prefill_pod_in_trouble_costs_its_ticket_only(stack: Stack) -> None:
    prompt = "the quick brown fox " * 200
    expected = texts(ask(stack, prompt=prompt))
    before = stack.metric("tasuki_gateway_prefill_leg_failures_total")
    for status in (500, 503, 400):
        stack.prefill[0].fault(times=1, status=status)
        assert texts(ask(stack, prompt=prompt)) == expected
    assert stack.metric("tasuki_gateway_prefill_leg_failures_total") == before + 3


def test_a_prefix_nobody_comes_for_is_given_back(stack: Stack) -> None:
    stack.fault(times=2, status=503)
    body = ASKED | {"prompt": "the quick brown fox " * 200}
    assert stack.client.post("/v1/completions", json=body).status_code == 503
    deadline = time.monotonic() + 30
    while not any("cancelled" in event for event in stack.prefill[0].call("/seen")["seen"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_when_all_pods_keep_dying_the_client_is_told(stack: Stack) -> None:
    stack.fault(times=50, cut_after=700)
    body = stack.client.post("/v1/completions", json=ASKED | {"max_tokens": 200}).text
    stack.fault()
    assert body.endswith("data: [DONE]\n\n")
    error = json.loads(body.split("\n\n")[-3].removeprefix("data: "))["error"]
    assert error["type"] == "overloaded_error"
    assert "4 decode pods" in error["message"]


def test_a_client_that_hangs_up_cancels_at_the_pod(stack: Stack) -> None:
    stack.fault(delay=0.05)
    with stack.client.stream("POST", "/v1/completions", json=ASKED | {"max_tokens": 500}) as answer:
        next(answer.iter_bytes())
    stack.wait_idle()
    assert stack.metric("tasuki_gateway_requests_in_flight") == 0
    assert 'code="499"' in stack.client.get("/metrics").text


@pytest.mark.slow
def test_the_only_decode_pod_may_be_killed_and_restarted_in_mid_stream(start: Starter) -> None:
    stack = start(decode=1)
    expected = texts(ask(stack, max_tokens=60))
    stack.fault(delay=0.1)
    pod = stack.decode[0]

    def restart() -> None:
        pod.kill()
        time.sleep(1.0)
        pod.start()

    body = stack.stream_while(restart, ASKED | {"max_tokens": 60})
    assert texts(body) == expected
    assert stack.metric("tasuki_gateway_failovers_total") >= 1


@pytest.mark.slow
def test_a_stream_never_goes_on_with_another_version_of_its_model(start: Starter) -> None:
    stack = start(decode=1, prefill=0)
    stack.fault(delay=0.1)
    pod = stack.decode[0]

    def replace() -> None:
        pod.kill()
        pod.start("--fingerprint", "f2", "--revision", "other")

    body = stack.stream_while(replace, ASKED | {"max_tokens": 60})
    error = json.loads(body.split("\n\n")[-3].removeprefix("data: "))["error"]
    assert "another version" in error["message"]
    assert stack.client.post("/v1/completions", json=ASKED).status_code == 200


@pytest.mark.slow
def test_a_stream_goes_on_with_other_settings_of_its_model(start: Starter) -> None:
    stack = start(decode=1, prefill=0)
    expected = texts(ask(stack, max_tokens=60))
    stack.fault(delay=0.1)
    pod = stack.decode[0]

    def replace() -> None:
        pod.kill()
        pod.start("--fingerprint", "f2")

    body = stack.stream_while(replace, ASKED | {"max_tokens": 60})
    assert texts(body) == expected
    assert stack.metric("tasuki_gateway_failovers_total") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_met_another_model_is_tokenized_for_it(
    start: Starter, tmp_path: Path, stream: bool
) -> None:
    stack = start(decode=1, prefill=0)
    pod = stack.decode[0]
    other = tmp_path / "tokenizer.json"
    other.write_bytes(tokenizer_json(vocab_size=260))
    before = stack.client.post("/tokenize", json={"prompt": "the quick"}).json()["tokens"]
    pod.kill()
    pod.start("--fingerprint", "f2", "--revision", "other", "--tokenizer", str(other))
    asked = {"prompt": "the quick brown fox", "max_tokens": 12, "seed": 5, "stream": stream}
    first = stack.client.post("/v1/completions", json=asked)
    assert first.status_code == 200, first.text
    assert stack.client.post("/tokenize", json={"prompt": "the quick"}).json()["tokens"] != before
    second = stack.client.post("/v1/completions", json=asked)
    if stream:
        assert texts(first.text) == texts(second.text)
    else:
        assert first.json()["choices"] == second.json()["choices"]
        assert first.json()["usage"] == second.json()["usage"]


@pytest.mark.slow
def test_a_pod_that_freezes_is_left_by_its_streams(start: Starter) -> None:
    stack = start()
    expected = texts(ask(stack, max_tokens=60))
    stack.fault(delay=0.02)
    bodies: list[str] = []

    def stream() -> None:
        with httpx.Client(base_url=stack.url, timeout=60) as client:
            bodies.append(client.post("/v1/completions", json=ASKED | {"max_tokens": 60}).text)

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    stack.decode[0].process.send_signal(signal.SIGSTOP)
    for thread in threads:
        thread.join()
    stack.decode[0].process.send_signal(signal.SIGCONT)
    assert [texts(body) for body in bodies] == [expected] * 4
