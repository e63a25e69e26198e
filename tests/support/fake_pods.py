"""A process that speaks the pods' protocol without an engine, for the gateway's tests and bench.

Its tokens are a pure function of (prompt, seed, sample, position), as a real pod's are, so a stream
continued elsewhere has one right answer. POST /fault sets what goes wrong next. It also answers
POST /v1/chat/completions as an OpenAI worker does, for routers of others in the benchmark.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import uvicorn
import xxhash
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tasuki_common import frames
from tasuki_common.messages import (
    UNAVAILABLE,
    GenerateRequest,
    Load,
    Member,
    ModelCard,
    PrefillRequest,
    Ticket,
    Usage,
)
from tasuki_common.policy import Policy
from tasuki_common.text_stream import TextStream
from tasuki_common.tokenizer import Tokenizer
from tasuki_index import Index, Publisher

MODEL = "fake"
_POLLED = ("/health", "/ready", "/v1/models", "/get_model_info", "/get_server_info")
CONTEXT = 4096
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_json = msgspec.json.Encoder().encode


def tokenizer_json(vocab_size: int = 600) -> bytes:
    """A small byte-level BPE, the same in every process."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and runs home über die Brücke 日本語 "
    inner.train_from_iterator([text * 4], trainer)
    return inner.to_str().encode()


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next requests; all zero: nothing."""

    times: int = 0
    """Requests that the fault below hits."""
    cut_after: int = -1
    """Bytes of the stream's body after which the connection is dropped."""
    status: int = 0
    """Answered instead of serving."""
    kind: int = -1
    """Frame kind (ERROR, RETRY) that ends the stream after `frames` frames."""
    frames: int = 0
    hang: float = 0.0
    """Seconds before anything is answered."""
    stall_after: int = -1
    """Frames after which the stream falls silent."""
    stray_after: int = -1
    """Frames after which one of a choice that nobody asked for follows in the same write."""
    delay: float = 0.0
    """Seconds between frames; without `times`, for all requests."""


def next_token(prompt: list[int], seed: int, sample: int, position: int, vocab: int) -> int:
    """The token at `position` of sample `sample`: f(prompt, seed, sample, position)."""
    key = struct.pack(f"<{len(prompt)}Iqii", *prompt, seed, sample, position)
    return xxhash.xxh3_64_intdigest(key) % vocab


class FakePod:
    """The process's state and its endpoints."""

    def __init__(self, options: argparse.Namespace, port: int) -> None:
        self.options = options
        self.fault = Fault()
        self.files = {
            "tokenizer.json": (
                Path(options.tokenizer).read_bytes() if options.tokenizer else tokenizer_json()
            ),
            "tokenizer_config.json": _json({"chat_template": _TEMPLATE}),
        }
        self.tokenizer = Tokenizer.from_files(self.files)
        self.url = f"http://127.0.0.1:{port}"
        self.incarnation = secrets.token_hex(4)
        self.draining = False
        self.running = 0
        self.policy = msgspec.json.decode(options.policy, type=Policy)
        self.seen: list[dict[str, Any]] = []
        """What each request brought, for tests to look at."""

    def member(self) -> Member:
        options = self.options
        return Member(
            pod=options.name,
            incarnation=self.incarnation,
            role=options.role,
            model=options.model,
            aliases=(f"{options.model}-alias",),
            fingerprint=options.fingerprint,
            url=self.url,
            transfer=("tcp",),
            max_model_len=options.context,
            block_size=16,
            hash_algorithm="xxh3",
            hash_revision=options.revision,
            needs_checkpoint=True,
            draining=self.draining,
            policy=self.policy,
            load=Load(running=self.running, blocks_free=10**6, blocks_total=10**6),
        )

    def routes(self) -> list[Route]:
        """All endpoints; /generate as raw ASGI, as pods have it."""

        async def member(request: Request) -> Response:
            return Response(msgspec.msgpack.encode(self.member()))

        async def card(request: Request) -> Response:
            return Response(
                msgspec.msgpack.encode(
                    ModelCard(
                        model=self.options.model,
                        fingerprint=self.options.fingerprint,
                        root="file:///fake",
                        vocab_size=self.tokenizer.vocab_size,
                        created=1,
                        files=self.files,
                    )
                )
            )

        async def set_fault(request: Request) -> Response:
            self.fault = Fault(**await request.json())
            return JSONResponse({})

        async def set_policy(request: Request) -> Response:
            self.policy = msgspec.json.decode(await request.body(), type=Policy)
            return JSONResponse({})

        async def seen(request: Request) -> Response:
            return JSONResponse({"seen": self.seen, "running": self.running})

        async def cancel(request: Request) -> Response:
            self.seen.append({"cancelled": request.path_params["id"]})
            return JSONResponse({})

        return [
            Route("/generate", _Raw(self.generate), methods=["POST"]),
            Route("/prefill", self.prefill, methods=["POST"]),
            Route("/v1/chat/completions", _Raw(self.openai), methods=["POST"]),
            Route("/requests/{id}", cancel, methods=["DELETE"]),
            Route("/member", member),
            Route("/card", card),
            Route("/fault", set_fault, methods=["POST"]),
            Route("/policy", set_policy, methods=["POST"]),
            Route("/seen", seen),
            *(Route(path, _fine) for path in _POLLED),
        ]

    def _next_fault(self) -> Fault:
        fault = self.fault
        if fault.times > 0:
            fault.times -= 1
            return fault
        return Fault(delay=fault.delay)

    async def prefill(self, request: Request) -> Response:
        """A ticket at once."""
        asked = msgspec.msgpack.decode(await request.body(), type=PrefillRequest)
        fault = self._next_fault()
        if self.options.record:
            self.seen.append({"prefill": asked.request_id, "tokens": len(asked.prompt_token_ids)})
        await asyncio.sleep(fault.hang)
        if fault.status:
            return JSONResponse({"error": {"message": "fault", "type": "x"}}, fault.status)
        ticket = Ticket(
            request_id=asked.request_id,
            num_tokens=(len(asked.prompt_token_ids) - 1) // 16 * 16,
            pod=self.options.name,
            incarnation=self.incarnation,
            fingerprint=self.options.fingerprint,
            host="127.0.0.1",
            port=1,
            backends=("tcp",),
            lease_seconds=30.0,
        )
        return Response(msgspec.msgpack.encode(ticket))

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Frames of n choices, one token of each in turn."""
        asked = msgspec.msgpack.decode(await _body(receive), type=GenerateRequest)
        fault = self._next_fault()
        if self.options.record:
            self.seen.append(
                {
                    "generate": asked.request_id,
                    "ticket": asked.ticket is not None,
                    "resume": [len(choice.token_ids) for choice in asked.resume],
                }
            )
        await asyncio.sleep(fault.hang)
        stranger = asked.fingerprint not in ("", self.options.fingerprint)
        if stranger:
            fault = Fault(status=503)
        if fault.status:
            headers = {"retry-after": "1"}
            error = {"error": {"message": "as told", "type": "invalid_request_error", "param": "x"}}
            if stranger:
                error["error"]["code"] = UNAVAILABLE
            await JSONResponse(error, fault.status, headers)(scope, receive, send)
            return
        self.running += 1
        gone = asyncio.create_task(_gone(receive))
        try:
            await _start(send, frames.CONTENT_TYPE)
            sent = 0
            for number, frame in enumerate(self._frames(asked, fault)):
                if fault.stall_after == number:
                    await gone
                if fault.stray_after == number:
                    frame += frames.encode(frames.Kind.CHUNK, 99, [1], b"")
                if 0 <= fault.cut_after < sent + len(frame):
                    await _part(send, frame[: fault.cut_after - sent])
                    raise _Cut
                await _part(send, frame)
                sent += len(frame)
                if pause := fault.delay or self.options.pause:
                    await asyncio.sleep(pause)
                if gone.done():
                    self.seen.append({"gone": asked.request_id})
                    return
            if fault.cut_after >= 0:
                raise _Cut
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self.running -= 1

    def _frames(self, asked: GenerateRequest, fault: Fault) -> Iterator[bytes]:
        for count, frame in enumerate(self._answer(asked)):
            if fault.kind >= 0 and count == fault.frames:
                error = {"error": {"message": "as told", "type": "server_error"}}
                yield frames.encode(frames.Kind(fault.kind), 0, [], _json(error))
                return
            yield frame

    def _answer(self, asked: GenerateRequest) -> Iterator[bytes]:
        sampling, chat = asked.sampling, asked.endpoint == "chat"
        limit = min(
            CONTEXT - len(asked.prompt_token_ids),
            CONTEXT if sampling.max_tokens is None else sampling.max_tokens,
        )
        out, texts = [], []
        for choice in range(sampling.n):
            had = asked.resume[choice].token_ids if asked.resume else []
            out.append(list(had))
            texts.append(TextStream(self.tokenizer, sampling, had))
            if chat and not had:
                yield frames.encode(frames.Kind.CHUNK, choice, [], _event(asked, choice, role=True))
        live = [c for c in range(sampling.n) if not (asked.resume and asked.resume[c].finished)]
        for choice in itertools.chain.from_iterable(itertools.repeat(live, limit)):
            done = out[choice]
            if len(done) >= limit or texts[choice].finished:
                continue
            token = next_token(
                asked.prompt_token_ids,
                sampling.seed or 0,
                choice,
                len(done),
                self.tokenizer.vocab_size,
            )
            done.append(token)
            delta = texts[choice].push([token], "length" if len(done) == limit else None)
            event = _event(asked, choice, delta.text, delta.finish_reason, [token])
            if not (delta.text or delta.finished or asked.return_token_ids):
                event = b""
            kind = frames.Kind.FINISH if delta.finished else frames.Kind.CHUNK
            yield frames.encode(kind, choice, [token], event)
        usage = Usage(
            prompt_tokens=len(asked.prompt_token_ids),
            completion_tokens=sum(map(len, out)),
            cached_tokens=0,
        )
        yield frames.encode(frames.Kind.DONE, 0, [], _json(usage))

    async def openai(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What a plain worker answers: 32 chunks, or one answer."""
        asked = msgspec.json.decode(await _body(receive))
        count = asked.get("max_tokens", 16)
        if not asked.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "word " * count}}
            choice["finish_reason"] = "length"
            usage = {
                "prompt_tokens": 1000,
                "completion_tokens": count,
                "total_tokens": 1000 + count,
            }
            answer = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL}
            await JSONResponse(answer | {"choices": [choice], "usage": usage})(scope, receive, send)
            return
        await _start(send, "text/event-stream")
        event = (
            b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"fake",'
            b'"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
        )
        for _ in range(count):
            await _part(send, event)
            await asyncio.sleep(self.options.pause)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class _Cut(Exception):  # noqa: N818 - what a test asked for
    """Ends a response by dropping its connection, as a dying process does."""


class _Raw:
    def __init__(self, handler: Any) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._handler(scope, receive, send)
        except _Cut:  # uvicorn closes a connection whose response was not completed
            return
        except Exception:
            traceback.print_exc()
            raise


def _event(
    asked: GenerateRequest,
    choice: int,
    text: str = "",
    finish: str | None = None,
    tokens: list[int] | None = None,
    *,
    role: bool = False,
) -> bytes:
    chat = asked.endpoint == "chat"
    delta = {"role": "assistant", "content": ""} if role else {"content": text}
    body: dict[str, Any] = {
        "index": asked.choice_offset + choice,
        **({"delta": delta} if chat else {"text": text}),
        "logprobs": None,
        "finish_reason": finish,
    }
    if asked.return_token_ids and tokens is not None:
        body["token_ids"] = tokens
    chunk = {
        "id": asked.response_id,
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": asked.created,
        "model": asked.model,
        "choices": [body],
    }
    return b"data: " + _json(chunk) + b"\n\n"


async def _fine(request: Request) -> Response:
    return JSONResponse({"model_path": MODEL, "data": [{"id": MODEL}]})


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def serve(options: argparse.Namespace) -> None:
    """Serves until SIGTERM."""
    listener = socket.create_server(("127.0.0.1", options.port), backlog=2048)
    pod = FakePod(options, listener.getsockname()[1])
    app = Starlette(routes=pod.routes())
    config = uvicorn.Config(app, log_level="critical", loop="uvloop", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    index = Index(options.redis_url) if options.redis_url else None
    publisher = Publisher(index, pod.member, ttl=2.0) if index else None
    if publisher:
        publisher.start()
    sys.stdout.write(f"{pod.url}\n")
    sys.stdout.flush()
    await server.serve([listener])
    if publisher and index:
        await publisher.close()
        await index.close()


class Process:
    """A fake pod as a child process, with its URL."""

    def __init__(self, role: str, name: str, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, __file__, "--role", role, "--name", name, "--port", str(port)]
        self._command = [*command, *arguments]
        self.name = name
        self.start()

    def start(self, *arguments: str) -> None:
        """Starts it (again), perhaps with more arguments, and waits for its address."""
        self._command += arguments
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, env=environment, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, f"the fake pod {self.name} did not start"
        port = self.url.rpartition(":")[2]
        self._command[self._command.index("--port") + 1] = port

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST of JSON; the JSON answer."""
        data = None if body is None else _json(body)
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, data=data), timeout=10
        ) as answer:
            return msgspec.json.decode(answer.read())

    def fault(self, **what: Any) -> None:
        """Sets what goes wrong next, see `Fault`."""
        self.call("/fault", what)

    def kill(self) -> None:
        """As a crash does."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> None:
        """Ends it, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()


class GatewayProcess:
    """`tasuki gateway` as a child process."""

    def __init__(self, *arguments: str, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        code = "import sys; from tasuki_gateway.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "--port", str(port), *arguments]
        with log.open("ab") as stream:
            self.process = subprocess.Popen(command, stderr=stream)

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Until /ready says so."""
        deadline = time.monotonic() + seconds
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(self.url + "/ready", timeout=2),
            ):
                return
            assert self.process.poll() is None, "the gateway ended"
            assert time.monotonic() < deadline, "the gateway did not become ready"
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def main() -> None:
    """Runs one fake pod; its first line on standard output is its URL."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL, help="Served name.")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--fingerprint", default="f1")
    parser.add_argument("--revision", default="r", help="Pods of one compute the same tokens.")
    parser.add_argument("--redis-url", default="")
    parser.add_argument("--tokenizer", default="", help="A tokenizer.json of another size.")
    parser.add_argument("--pause", type=float, default=0.0, help="Seconds between tokens.")
    parser.add_argument("--policy", default="{}", help="As the pods' policy file.")
    parser.add_argument("--no-record", dest="record", action="store_false")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
