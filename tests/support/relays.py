"""A whole relay for tests: Redis, prefill pods, decode pods and a gateway, all real processes."""

import contextlib
import dataclasses
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import httpx
import plain_http
import psutil
from fake_pods import GatewayProcess
from pods import PodProcess
from redis_server import RedisServer, free_port

POD_FLAGS: dict[str, Any] = {"heartbeat_seconds": 3.0, "drain_seconds": 20.0}
SHORT_DRAIN_SECONDS = 0.1
"""What 1,800 tokens surely outlast: a GPU makes some thousand a second."""


class Relay:
    """One model behind one gateway; `start` returns when a request would be answered.

    There is a decode pod for each of `transports`, the one that it takes prefixes through; as model
    `through-tcp` or `through-nixl` a client asks for the pods of that transport, as `tiny` for any.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        prefill: int = 1,
        transports: tuple[str, ...] = ("tcp", "nixl"),
        index: bool = True,
        seeds: bool = True,
        threshold: int = 0,
        gateway_flags: tuple[str, ...] = (),
        engine: dict[str, Any] | None = None,
        prefill_engine: dict[str, Any] | None = None,
        **pod_flags: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model = model
        self.folder = folder
        self.redis = RedisServer(folder, tcp=True) if index else None
        flags = {**POD_FLAGS, **pod_flags}
        if self.redis is not None:
            self.redis.start()
            flags["redis_url"] = self.redis.url

        def pods(
            role: str, transports: list[tuple[str, ...]], engine: dict[str, Any]
        ) -> list[PodProcess]:
            return [
                PodProcess(
                    role,
                    model,
                    folder / f"{role}-{number}.log",
                    engine=engine,
                    **{
                        "pod_name": f"{role}-{number}",
                        "port": free_port(),
                        "transfer_port": free_port(),
                        "transfer_backends": ",".join(backends),
                        "aliases": ",".join(f"through-{backend}" for backend in backends),
                        **flags,
                    },
                )
                for number, backends in enumerate(transports)
            ]

        engine = engine or {}
        every = tuple(dict.fromkeys(transports))
        self.prefill = pods("prefill", [every] * prefill, {**engine, **(prefill_engine or {})})
        self.decode = pods("decode", [(backend,) for backend in transports], engine)
        self.gateway_log = folder / "gateway.log"
        self._gateway_flags = [f"--prefill-threshold={threshold}", *gateway_flags]
        if self.redis is not None:
            self._gateway_flags.append(f"--redis-url={self.redis.url}")
        if seeds:
            urls = (f"http://127.0.0.1:{pod.flags['port']}" for pod in self.pods)
            self._gateway_flags.append("--seeds=" + ",".join(urls))
        self.gateway: GatewayProcess
        self.started = False

    @property
    def pods(self) -> list[PodProcess]:
        """Prefill pods, then decode pods."""
        return [*self.prefill, *self.decode]

    @property
    def url(self) -> str:
        """The gateway's."""
        return self.gateway.url

    def start(self) -> "Relay":
        """Waits for all pods, and for the gateway to know them."""
        self.gateway = self.new_gateway()
        self.started = True
        for pod in self.pods:
            pod.wait_ready()
        self.gateway.wait_ready()
        self.until_routed()
        return self

    def new_gateway(self, *flags: str, port: int = 0) -> GatewayProcess:
        """Another gateway of this relay, started now; on a free port unless one is given."""
        flags = (*self._gateway_flags, *flags)
        return GatewayProcess(*flags, port=port or free_port(), log=self.gateway_log)

    def until_routed(self, seconds: float = 30.0) -> None:
        """Until the gateway routes to all pods of the relay."""
        until(
            lambda: self.metric("tasuki_gateway_pods", model="tiny") == len(self.pods),
            seconds,
            "the gateway does not route to all pods",
        )

    def heal(self) -> None:
        """Starts again what was killed, on the same ports."""
        if self.gateway.process.poll() is not None:
            self.gateway = self.new_gateway()
        for pod in self.pods:
            if pod.process.poll() is not None:
                pod.restart()
        self.gateway.wait_ready()
        self.until_routed()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of those samples of a gateway's metric that have these labels."""
        return plain_http.metric(self.url, name, labels)

    def decode_metric(self, name: str, **labels: str) -> float:
        """The same over all decode pods."""
        return sum(pod.metric(name, **labels) for pod in self.decode)

    def until_idle(self, seconds: float = 30.0) -> None:
        """Until no pod holds anything for anybody; AssertionError names what is left."""
        names = (
            "tasuki_requests_running",
            "tasuki_requests_waiting",
            "tasuki_blocks_used",
            "tasuki_window_blocks_used",
            "tasuki_state_slots_used",
            "tasuki_leases",
        )
        deadline = time.monotonic() + seconds
        while left := self._left(names):
            assert time.monotonic() < deadline, f"still held: {left}"
            time.sleep(0.1)

    def _left(self, names: tuple[str, ...]) -> dict[str, float]:
        left = {
            f"{pod.flags['pod_name']} {name}": value
            for pod in self.pods
            for name in names
            if (value := pod.metric(name))
        }
        if value := self.metric("tasuki_gateway_requests_in_flight"):
            left["gateway requests_in_flight"] = value
        return left

    def processes(self) -> dict[str, psutil.Process]:
        """All of them by name, the engines' too."""
        found = {"gateway": psutil.Process(self.gateway.process.pid)}
        for pod in self.pods:
            name = str(pod.flags["pod_name"])
            found[name] = psutil.Process(pod.process.pid)
            found[f"{name} engine"] = psutil.Process(pod.engine_pid())
        return found

    def resources(self) -> dict[str, int]:
        """Of each process: its descriptors, connections to Redis aside, and those; threads; tasks
        of its event loop."""
        found = {}
        for name, process in self.processes().items():
            pooled = self._connections_to_redis(process)
            found[f"{name} descriptors"] = process.num_fds() - pooled
            found[f"{name} connections to Redis"] = pooled
            found[f"{name} threads"] = process.num_threads()
        found["gateway tasks"] = int(self.metric("tasuki_gateway_event_loop_tasks"))
        for pod in self.pods:
            found[f"{pod.flags['pod_name']} tasks"] = int(pod.metric("tasuki_event_loop_tasks"))
        return found

    def _connections_to_redis(self, process: psutil.Process) -> int:
        if self.redis is None:
            return 0
        ends = [connection.raddr for connection in process.net_connections("tcp")]
        return sum(end == self.redis.address for end in ends)

    def stop(self) -> None:
        """Ends all; an engine whose books do not balance in the end is an error."""
        stopping = [("gateway", self.gateway.process, self.gateway.stop)] if self.started else []
        problems = [_stop(*one) for one in stopping]
        with futures.ThreadPoolExecutor() as executor:
            pods = [(str(pod.flags["pod_name"]), pod.process, pod.stop) for pod in self.pods]
            problems += executor.map(lambda pod: _stop(*pod), pods)
        if self.redis is not None:
            self.redis.stop()
        problems += [pod.log.read_text()[-4000:] for pod in self.pods if pod.lines("engine_failed")]
        assert not any(problems), "\n".join(problems)


def _stop(name: str, process: "subprocess.Popen[bytes]", stop: Callable[[], int]) -> str:
    """Stops one process that may have ended already; what was wrong with its end."""
    if process.poll() is not None:
        return ""
    try:
        status = stop()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        process.kill()
        return f"{name}: {error}"
    return f"{name} left with {status}" if status else ""


@contextlib.contextmanager
def running(relay: Relay) -> Iterator[Relay]:
    """Starts a relay and stops it in the end."""
    try:
        yield relay.start()
    finally:
        relay.stop()


@dataclasses.dataclass
class Stream:
    """What a client has seen of one streamed answer."""

    status: int = 0
    text: dict[int, str] = dataclasses.field(default_factory=dict)
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    logprobs: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    finish: dict[int, str] = dataclasses.field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    done: bool = False

    def take(self, data: str) -> None:
        """One event's data."""
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            index = choice["index"]
            self.text[index] = self.text.get(index, "") + choice["text"]
            self.tokens.setdefault(index, []).extend(choice.get("token_ids") or [])
            if choice.get("logprobs"):
                values = choice["logprobs"]["token_logprobs"]
                self.logprobs.setdefault(index, []).extend(values)
            if choice["finish_reason"] is not None:
                assert index not in self.finish, "a choice finishes once"
                self.finish[index] = choice["finish_reason"]

    @property
    def whole(self) -> bool:
        """It came to its end without an error."""
        return self.status == 200 and self.done and self.error is None


def body(prompt: list[int] | str, **options: Any) -> dict[str, Any]:
    """A greedy streamed completion unless told otherwise; end tokens do not end it."""
    return {
        "model": "tiny",
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": 16,
        **options,
    }


async def events(
    client: httpx.AsyncClient,
    relay: Relay,
    request: dict[str, Any],
    stream: Stream,
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Stream]:
    """Sends a completion; yields `stream` after each event of the answer."""
    url = f"{relay.url}/v1/completions"
    async with client.stream("POST", url, json=request, headers=headers) as response:
        stream.status = response.status_code
        if stream.status != 200:
            stream.error = json.loads(await response.aread())["error"]
            return
        async for line in response.aiter_lines():
            if line:
                stream.take(line.removeprefix("data: "))
                yield stream


async def complete(
    client: httpx.AsyncClient, relay: Relay, prompt: list[int] | str, **options: Any
) -> Stream:
    """A whole streamed completion."""
    stream = Stream()
    async for _ in events(client, relay, body(prompt, **options), stream):
        pass
    return stream


def until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Waits for a condition; AssertionError(`otherwise`) when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The events of a process's log."""
    found = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
