"""One request is one trace: a span for every leg, from every process, with the right parents."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from relays import Relay, running
from trace_collector import Collector, check_parents, collecting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SECONDS = 60.0
CLIENT_TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(collector: Collector, folders: Path, model: Path) -> Iterator[Relay]:
    """A relay whose processes export their spans at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running(Relay(folders / "traced", model, transports=("tcp",))) as relay:
            yield relay


def ask(relay: Relay, **headers: str) -> str:
    """One streamed answer to a prompt that nobody has; its request id."""
    prompt = [5 + time.monotonic_ns() // 10**i % 90 for i in range(64)]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "stream": True}
    answer = httpx.post(f"{relay.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    return answer.headers["x-request-id"]


def test_a_trace_has_every_leg_under_its_parent(traced: Relay, collector: Collector) -> None:
    found = collector.legs(ask(traced))
    check_parents(found)
    spans = {span.name: span for span in found.values()}
    assert all(0 < span.seconds <= SECONDS for span in found.values())
    assert spans["hand_over"].attributes["tasuki.backend"] == "tcp"
    assert spans["prefix"].attributes["tasuki.outcome"] == "released"
    assert spans["request"].attributes["tasuki.status"] == 200


def test_a_clients_own_trace_goes_on_here(traced: Relay, collector: Collector) -> None:
    request_id = ask(traced, traceparent=f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01")
    request = collector.legs(request_id)["tasuki-gateway", "request"]
    assert request.trace.hex() == CLIENT_TRACE
    assert request.parent.hex() == CLIENT_SPAN


def test_a_header_that_is_no_trace_begins_a_new_one(traced: Relay, collector: Collector) -> None:
    request = collector.legs(ask(traced, traceparent="00-nonsense"))["tasuki-gateway", "request"]
    assert request.parent == b""
