"""The routes of a decode pod: take over state, stream tokens as frames."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from tasuki_common import logs, tracing
from tasuki_common.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    TasukiError,
    UnavailableError,
)
from tasuki_common.frames import CONTENT_TYPE, Kind, encode
from tasuki_common.messages import GenerateRequest
from tasuki_common.tokenizer import Tokenizer
from tasuki_decode.generation import Generation
from tasuki_pod.engine_client import EngineLostError
from tasuki_pod.http import Endpoint, error_body, read_message, until_disconnect
from tasuki_pod.pod import Pod

log = logs.get("tasuki.decode")

_CANCELLED = "The request was cancelled."
_OUTCOMES: dict[type[TasukiError], str] = {
    DeadlineError: "deadline",
    EngineLostError: "retry",
    OverloadedError: "overloaded",
    RequestError: "refused",
}
_HEADERS = [(b"content-type", CONTENT_TYPE.encode()), (b"cache-control", b"no-store")]


def routes(pod: Pod) -> Sequence[BaseRoute]:
    """What a decode pod serves beside the common routes."""
    generations = Generations(pod)
    return [
        Route("/generate", Endpoint(generations.generate), methods=["POST"]),
        Route("/requests/{request_id}", generations.delete, methods=["DELETE"]),
    ]


class Generations:
    """All streams of a pod."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._decoder = msgspec.msgpack.Decoder(GenerateRequest)
        self._running: dict[str, set[_Term]] = {}
        self._tokenizer: asyncio.Future[Tokenizer] | None = None
        if Path(pod.config.model).is_dir():  # read while the engine loads
            self._tokenizer = self._load(pod.config.model)

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /generate: GenerateRequest → frames; closing the connection cancels."""
        with self._pod.admission():
            request = await read_message(receive, self._decoder)
            _check(request, self._pod)
            generation = Generation(self._pod, await self._tokenizer_of_model(), request)
            name, pod = request.request_id, self._pod.config.pod_name
            try:
                with (
                    tracing.span("generate", request.trace, request_id=name, pod=pod),
                    self._term(request) as term,
                ):
                    await until_disconnect(receive, self._serve(generation, term, send))
            finally:
                generation.close()

    async def delete(self, request: Request) -> Response:
        """DELETE /requests/{id}: ends its streams."""
        for term in self._running.get(request.path_params["request_id"], ()):
            term.cancel()
        return Response(status_code=204)

    @contextlib.contextmanager
    def _term(self, request: GenerateRequest) -> Iterator["_Term"]:
        """The request's term, to be found by DELETE while the block runs."""
        term = _Term(request.timeout)
        same_id = self._running.setdefault(request.request_id, set())
        same_id.add(term)
        try:
            yield term
        finally:
            same_id.discard(term)
            if not same_id:
                self._running.pop(request.request_id, None)

    async def _serve(self, generation: Generation, term: "_Term", send: Send) -> None:
        """Frames, and in the end an error as a status or, once frames are out, as a frame."""
        begun = False

        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            async with term:
                await generation.admit()
                begun = True
                start = {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                await send(start)
                await generation.stream(write)
        except TasukiError as error:
            outcome = "cancelled" if term.cancelled else _OUTCOMES.get(type(error), "error")
            self._pod.metrics.request_ended(outcome)
            if not begun:
                raise
            kind = Kind.RETRY if isinstance(error, EngineLostError) else Kind.ERROR
            await write(encode(kind, 0, [], msgspec.json.encode(error_body(error)[1])))
        except asyncio.CancelledError:
            self._pod.metrics.request_ended("cancelled")
            raise
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tokenizer_of_model(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._load(self._pod.engine.folder)
        return await asyncio.shield(self._tokenizer)

    def _load(self, folder: str) -> "asyncio.Future[Tokenizer]":
        loading = asyncio.ensure_future(asyncio.to_thread(Tokenizer.from_folder, folder))
        loading.add_done_callback(_note_failure)
        return loading


class _Term(contextlib.AbstractAsyncContextManager[None]):
    """The time a request has; `cancel` ends it now.

    Raises:
        DeadlineError, RequestError: on leaving the block, when the time was over or cancelled.
    """

    def __init__(self, seconds: float) -> None:
        self._scope = asyncio.timeout(seconds)
        self._entered = False
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the block, wherever it waits."""
        self.cancelled = True
        if self._entered and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def __aenter__(self) -> None:
        if self.cancelled:
            raise RequestError(_CANCELLED)
        await self._scope.__aenter__()
        self._entered = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError as over:
            if self.cancelled:
                raise RequestError(_CANCELLED) from over
            raise DeadlineError("The request's deadline passed before it was done.") from over


def _note_failure(loading: "asyncio.Future[Tokenizer]") -> None:
    """Says at once what every request would be told."""
    if not loading.cancelled() and (error := loading.exception()) is not None:
        log.error("no_tokenizer", reason=str(error))


def _check(request: GenerateRequest, pod: Pod) -> None:
    if request.fingerprint not in ("", pod.engine.fingerprint):
        raise UnavailableError(
            f"Pod {pod.config.pod_name} serves {pod.engine.fingerprint}, not "
            f"{request.fingerprint} that the prompt was tokenized for; ask another one."
        )
    if request.resume and len(request.resume) != request.sampling.n:
        raise RequestError(
            f"resume has {len(request.resume)} choices, n is {request.sampling.n}.", param="resume"
        )
    if request.sampling.seed is None:
        raise RequestError(
            "sampling.seed is missing; without it no other pod could go on.", param="seed"
        )
