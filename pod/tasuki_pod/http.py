"""Pieces of HTTP that both kinds of pod need: bodies in, answers and errors out, as raw ASGI."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tasuki_common import logs
from tasuki_common.errors import (
    DeadlineError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TasukiError,
    UnavailableError,
)
from tasuki_common.messages import UNAVAILABLE, ErrorBody, ErrorResponse
from tasuki_pod.engine_client import EngineLostError

log = logs.get("tasuki.http")

M = TypeVar("M")

MSGPACK = "application/msgpack"
MAX_BODY_BYTES = 64 << 20
_RETRY_AFTER_LOSS = 5.0

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class Endpoint:
    """An ASGI endpoint of one handler: what it raises before it answers becomes the answer."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        begun = False

        async def watched(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._handler(scope, receive, watched)
        except ConnectionResetError as error:  # nobody is left to be answered
            log.debug("caller_left", path=scope["path"], reason=str(error))
        except TasukiError as error:
            if begun:
                raise
            await error_response(error)(scope, receive, send)


def error_body(error: TasukiError) -> tuple[int, ErrorResponse]:
    """Status and body of an error that a request ends with."""
    status, kind, code = 500, "server_error", None
    match error:
        case RequestError():
            status, kind = 400, "invalid_request_error"
        case NotFoundError():
            status, kind, code = 404, "invalid_request_error", "not_found"
        case UnavailableError() | EngineLostError():
            status, kind, code = 503, "overloaded_error", UNAVAILABLE
        case OverloadedError():
            status, kind, code = 503, "overloaded_error", "overloaded"
        case DeadlineError():
            status, kind, code = 504, "timeout_error", "timeout"
    param = getattr(error, "param", None)
    return status, ErrorResponse(
        error=ErrorBody(message=str(error), type=kind, param=param, code=code)
    )


def error_response(error: TasukiError) -> Response:
    """An error as a whole answer."""
    status, body = error_body(error)
    headers: Mapping[str, str] = {}
    if status == 503:
        seconds = getattr(error, "retry_after", _RETRY_AFTER_LOSS)
        headers = {"Retry-After": str(max(1, round(seconds)))}
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def msgpack_response(message: msgspec.Struct) -> Response:
    """A message as a whole answer."""
    return Response(msgspec.msgpack.encode(message), 200, media_type=MSGPACK)


async def read_message(receive: Receive, decoder: "msgspec.msgpack.Decoder[M]") -> M:
    """The request's body as a message.

    Raises:
        RequestError: it is none, or too long.
        ConnectionResetError: the caller left before it was complete.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("The caller left before its request was complete.")
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"The body is longer than {MAX_BODY_BYTES} bytes.")
        if not message.get("more_body", False):
            break
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise RequestError(f"The body is not the message expected here: {error}.") from error


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it when the caller leaves; what it raises is raised here."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait((task, watcher))
    if not task.cancelled():
        task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
