"""What goes wrong in a relay so that an alert is due: one way for each alert about one.

Each fault begins with the block and is over with it, but for what takes a while to recover.
"""

import asyncio
import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import httpx
import psutil
from pods import PodProcess
from relays import Relay, until

CROWD = 128
"""Clients; the decode pods have room for a few, the last waits 15 s of an engine's CPU alone."""
SLICE, FROZEN = 0.02, 2.5
"""Seconds of CPU that a slow engine gets between those in which it gets none."""
Fault = Callable[[Relay], AbstractContextManager[None]]


class Clients:
    """Clients of an endpoint that ask for one answer after the other, whatever comes back.

    `pause`: seconds between an answer and the next question; 0 takes all the CPU that there is.
    """

    def __init__(
        self,
        url: str,
        clients: int,
        *,
        model: str = "tiny",
        prompt_tokens: int = 120,
        max_tokens: int = 8,
        pause: float = 0.0,
    ) -> None:
        self._url, self._model, self._max_tokens = f"{url}/v1/completions", model, max_tokens
        self._clients, self._prompt_tokens, self._pause = clients, prompt_tokens, pause
        self._numbers = itertools.count(time.monotonic_ns() % 10**6)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._all(),))
        self._over = asyncio.Event()

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(60)
        self._loop.close()

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            tasks = [asyncio.ensure_future(self._ask(client)) for _ in range(self._clients)]
            await self._over.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        for number in self._numbers:
            tokens = range(self._prompt_tokens)
            prompt = [5 + (number * 7 + i * (1 + number % 5)) % 90 for i in tokens]
            body = {"model": self._model, "prompt": prompt, "stream": True, "ignore_eos": True}
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(self._url, json=body | {"max_tokens": self._max_tokens})
                if answer.status_code == 200:
                    await asyncio.sleep(self._pause)
                    continue
            await asyncio.sleep(0.1)


@contextlib.contextmanager
def crowd(relay: Relay) -> Iterator[None]:
    """Many more clients than the decode pods have blocks for."""
    with Clients(relay.url, CROWD, max_tokens=250):
        yield


@contextlib.contextmanager
def no_decode_pods(relay: Relay) -> Iterator[None]:
    """All are killed."""
    with _killed(relay, relay.decode):
        yield


@contextlib.contextmanager
def no_prefill_pods(relay: Relay) -> Iterator[None]:
    """All are killed; decode pods serve alone."""
    with _killed(relay, relay.prefill):
        yield


@contextlib.contextmanager
def decode_pods_lost(relay: Relay) -> Iterator[None]:
    """One dies while it streams, others take over."""
    dying = relay.decode[-1]
    with Clients(relay.url, 16, max_tokens=400):

        def streams_enough() -> bool:  # two more than the alert wants: some may be at their ends
            names = ("tasuki_requests_running", "tasuki_requests_waiting")
            return sum(map(dying.metric, names)) >= 6

        until(streams_enough, 60.0, "the pod to be killed has too few streams")
        with _killed(relay, [dying]):
            yield


@contextlib.contextmanager
def no_gateway(relay: Relay) -> Iterator[None]:
    """It is stopped."""
    relay.gateway.stop()
    try:
        yield
    finally:
        _gateway(relay)


@contextlib.contextmanager
def small_gateway(relay: Relay) -> Iterator[None]:
    """It takes one request at a time, and all others are too many."""
    relay.gateway.stop()
    _gateway(relay, "--max-requests=1")
    try:
        yield
    finally:
        relay.gateway.stop()
        _gateway(relay)


@contextlib.contextmanager
def slow_engines(relay: Relay) -> Iterator[None]:
    """The decode pods' engines take a few steps, then none for a while, however busy it is."""
    engines = [
        process
        for name, process in relay.processes().items()
        if name.startswith("decode") and name.endswith("engine")
    ]
    over = threading.Event()

    def throttle() -> None:
        while not over.wait(FROZEN):
            for engine in engines:
                until = _cpu_seconds(engine) + SLICE
                deadline = time.monotonic() + FROZEN  # an idle one uses none
                engine.send_signal(signal.SIGCONT)
                while _cpu_seconds(engine) < until and time.monotonic() < deadline:
                    time.sleep(0.001)
                engine.send_signal(signal.SIGSTOP)

    throttling = threading.Thread(target=throttle)
    throttling.start()
    try:
        with Clients(relay.url, 24, prompt_tokens=20, max_tokens=3):
            yield
    finally:
        over.set()
        throttling.join()
        for engine in engines:
            engine.send_signal(signal.SIGCONT)


def _cpu_seconds(process: psutil.Process) -> float:
    """What it has used, by its own clock (clock_getcpuclockid(3)): /proc counts in 10 ms."""
    return time.clock_gettime(~process.pid << 3 | 2)


@contextlib.contextmanager
def no_index(relay: Relay) -> Iterator[None]:
    """Redis is stopped."""
    assert relay.redis is not None
    relay.redis.stop()
    try:
        yield
    finally:
        relay.redis.start()


@contextlib.contextmanager
def other_transfer_key(relay: Relay) -> Iterator[None]:
    """Decode pods have another one than prefill pods."""
    with futures.ThreadPoolExecutor() as at_once:
        for pod in relay.decode:
            pod.flags["transfer_key"] = "not the key that the prefill pods have"
        list(at_once.map(PodProcess.restart, relay.decode))
        try:
            yield
        finally:
            for pod in relay.decode:
                del pod.flags["transfer_key"]
            list(at_once.map(PodProcess.restart, relay.decode))


@contextlib.contextmanager
def _killed(relay: Relay, pods: Sequence[PodProcess]) -> Iterator[None]:
    """Without these pods."""
    for pod in pods:
        pod.kill()
    try:
        yield
    finally:
        relay.heal()


def _gateway(relay: Relay, *flags: str) -> None:
    """A new one where the old one was."""
    port = urlsplit(relay.url).port
    assert port is not None
    relay.gateway = relay.new_gateway(*flags, port=port)
    relay.gateway.wait_ready()


FAULTS: tuple[tuple[Fault, frozenset[str]], ...] = (
    (no_decode_pods, frozenset({"TasukiErrors", "TasukiModelWithoutPods"})),
    (no_prefill_pods, frozenset({"TasukiPrefillLost"})),
    (decode_pods_lost, frozenset({"TasukiPodsLost"})),
    (other_transfer_key, frozenset({"TasukiHandOversFail"})),
    (crowd, frozenset({"TasukiFirstTokenSlow", "TasukiQueueGrowing", "TasukiPreempting"})),
    (slow_engines, frozenset({"TasukiStreamsSlow", "TasukiLeasesExpire"})),
    (small_gateway, frozenset({"TasukiRefusing"})),
    (no_gateway, frozenset({"TasukiGatewayAbsent"})),
    (no_index, frozenset({"TasukiIndexUnreachable"})),
)
"""Each fault with the alerts that are due."""
