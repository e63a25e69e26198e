"""Real pods for tests, and a small client that speaks to them as a gateway does."""

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import plain_http

from tasuki_common.frames import Decoder, Frame, Kind
from tasuki_common.messages import (
    GenerateRequest,
    Member,
    PrefillRequest,
    ResumedChoice,
    Ticket,
    Usage,
)
from tasuki_common.sampling import SamplingParams

ENGINE = {"num_blocks": 400, "num_state_slots": 40, "max_num_batched_tokens": 64, "cpu_threads": 1}
KEY = secrets.token_hex(16)
START_SECONDS = 60.0


class PodProcess:
    """One running pod; `url` is known once it is ready."""

    def __init__(
        self,
        role: str,
        model: Path,
        log: Path,
        *,
        engine: dict[str, Any] | None = None,
        **flags: Any,
    ) -> None:
        self.role, self.log = role, log
        log.unlink(missing_ok=True)
        flags = {
            "model": model,
            "served_name": "tiny",
            "pod_name": f"{role}-{secrets.token_hex(3)}",
            "transfer_backends": "tcp",
            "engine": json.dumps({**ENGINE, **(engine or {})}),
            **flags,
        }
        self.flags = flags
        self.process = self._spawn()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in self.flags.items()]
        module = f"tasuki_{self.role}.main"
        program = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
        environment = {**os.environ, "TASUKI_TRANSFER_KEY": KEY, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", program, *arguments], env=environment, stderr=log
            )

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Log lines of one event, oldest first."""
        found = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if (entry := json.loads(line)).get("event") == event:
                    found.append(entry)
        return found

    def wait_ready(self, nth: int = 1) -> "PodProcess":
        """Until the pod has said for the nth time that it is ready."""
        deadline = time.monotonic() + START_SECONDS
        while len(self.lines("pod_ready")) < nth:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.role} pod did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.url = str(self.lines("pod_ready")[-1]["url"])
        return self

    def restart(self) -> "PodProcess":
        """Kills it and starts it again on the same ports."""
        ready = self.lines("pod_ready")[-1]
        self.kill()
        self.flags["port"] = ready["url"].rsplit(":", 1)[1]
        self.flags["transfer_port"] = ready["transfer"].rsplit(":", 1)[1]
        count = len(self.lines("pod_ready"))
        self.process = self._spawn()
        return self.wait_ready(count + 1)

    def engine_pid(self) -> int:
        """Of the process behind the pod that holds the engine."""
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(listing.split()[0])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return plain_http.metric(self.url, name, labels)

    def member(self) -> Member:
        """The pod as it announces itself."""
        return msgspec.msgpack.decode(plain_http.get(f"{self.url}/member").content, type=Member)

    def kill(self) -> None:
        """SIGKILL; its engine process must follow by itself."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{self.role} pod did not leave:\n{self.log.read_text()[-4000:]}"
            ) from None


@contextlib.contextmanager
def running(*pods: PodProcess) -> Iterator[tuple[PodProcess, ...]]:
    """Waits until all are ready; stops them in the end."""
    try:
        for pod in pods:
            pod.wait_ready()
        yield pods
    finally:
        for pod in pods:
            with contextlib.suppress(AssertionError):
                pod.stop()


async def leave(pod: PodProcess) -> None:
    """SIGTERM; the pod must be gone by itself, with status 0 and its books in balance."""
    assert await asyncio.to_thread(pod.stop, 30) == 0, pod.log.read_text()[-3000:]
    assert pod.lines("drain_6_gone")
    assert not pod.lines("engine_failed")


@dataclasses.dataclass
class Answer:
    """All that came of one stream, by choice."""

    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finished: set[int] = dataclasses.field(default_factory=set)
    frames: list[Frame] = dataclasses.field(default_factory=list)
    usage: Usage | None = None
    error: dict[str, Any] | None = None

    def add(self, frame: Frame) -> None:
        """Takes one frame in."""
        self.frames.append(frame)
        if frame.kind is Kind.DONE:
            self.usage = msgspec.json.decode(frame.payload, type=Usage)
            return
        if frame.kind in (Kind.ERROR, Kind.RETRY):
            self.error = {"kind": frame.kind, **json.loads(frame.payload)["error"]}
            return
        count = len(frame.tokens) // 4
        ids = list(memoryview(frame.tokens).cast("I")) if count else []
        self.tokens.setdefault(frame.choice, []).extend(ids)
        self.events += events_of(frame.payload)
        if frame.kind is Kind.FINISH:
            self.finished.add(frame.choice)

    def text(self, choice: int = 0) -> str:
        """What a client would have put together."""
        parts = []
        for event in self.events:
            for entry in event["choices"]:
                if entry["index"] == choice:
                    parts.append(entry["text"] if "text" in entry else entry["delta"]["content"])
        return "".join(parts)

    def finish_reasons(self, choice: int = 0) -> list[str]:
        """All that were said; there must be one."""
        return [
            entry["finish_reason"]
            for event in self.events
            for entry in event["choices"]
            if entry["index"] == choice and entry["finish_reason"] is not None
        ]


def events_of(payload: bytes) -> list[dict[str, Any]]:
    """The JSON of each server-sent event in a frame's payload."""
    parts = payload.split(b"\n\n")
    assert parts.pop() == b"", "a frame ends with a whole event"
    assert all(part.startswith(b"data: ") for part in parts)
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def generate_request(prompt: list[int], **options: Any) -> GenerateRequest:
    """A GenerateRequest; sampling fields and the request's own may be mixed."""
    own = {name: options.pop(name) for name in GenerateRequest.__struct_fields__ if name in options}
    sampling = {"temperature": 0.0, "seed": 7, "ignore_eos": True, "max_tokens": 16, **options}
    defaults = {
        "request_id": secrets.token_hex(6),
        "model": "tiny",
        "endpoint": "completion",
        "response_id": "cmpl-1",
        "created": 1,
    }
    return GenerateRequest(
        prompt_token_ids=prompt, sampling=SamplingParams(**sampling), **{**defaults, **own}
    )


async def stream(
    client: httpx.AsyncClient, pod: PodProcess, request: GenerateRequest
) -> AsyncIterator[Frame]:
    """The frames of a POST /generate as they come."""
    decoder = Decoder()
    body = msgspec.msgpack.encode(request)
    async with client.stream("POST", f"{pod.url}/generate", content=body) as response:
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for data in response.aiter_raw():
            for frame in decoder.feed(data):
                yield frame


async def generate(
    client: httpx.AsyncClient, pod: PodProcess, prompt: list[int], **options: Any
) -> Answer:
    """All frames of a POST /generate."""
    answer = Answer()
    async for frame in stream(client, pod, generate_request(prompt, **options)):
        answer.add(frame)
    return answer


async def post_and_leave(pod: PodProcess, request: GenerateRequest, seconds: float) -> None:
    """POST /generate by a caller who closes the connection after `seconds`."""
    host, port = pod.url.removeprefix("http://").split(":")
    body = msgspec.msgpack.encode(request)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await reader.read(-1)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def prefill(
    client: httpx.AsyncClient, pod: PodProcess, prompt: list[int], **options: Any
) -> Ticket:
    """POST /prefill."""
    request = PrefillRequest(request_id=secrets.token_hex(6), prompt_token_ids=prompt, **options)
    response = await client.post(f"{pod.url}/prefill", content=msgspec.msgpack.encode(request))
    assert response.status_code == 200, response.text
    return msgspec.msgpack.decode(response.content, type=Ticket)


async def relay(
    client: httpx.AsyncClient,
    prefill_pod: PodProcess,
    decode_pod: PodProcess,
    prompt: list[int],
    **options: Any,
) -> Answer:
    """Prompt computed by one pod, tokens from the other."""
    resume: tuple[ResumedChoice, ...] = options.get("resume", ())
    known = prompt + resume[0].token_ids if len(resume) == 1 else prompt
    ticket = await prefill(client, prefill_pod, known, cache_salt=options.get("cache_salt"))
    return await generate(client, decode_pod, prompt, ticket=ticket, **options)


async def until_idle(pod: PodProcess, seconds: float = 10.0) -> None:
    """Waits until nothing runs, waits, or is held in the pod; AssertionError names what is left."""
    names = (
        "tasuki_requests_running",
        "tasuki_requests_waiting",
        "tasuki_blocks_used",
        "tasuki_window_blocks_used",
        "tasuki_state_slots_used",
        "tasuki_leases",
    )
    deadline = time.monotonic() + seconds
    while left := {name: value for name in names if (value := pod.metric(name))}:
        assert time.monotonic() < deadline, f"{pod.role} pod still holds {left}"
        await asyncio.sleep(0.05)
