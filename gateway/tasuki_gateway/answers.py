"""What the pods' answers mean for a request."""

import contextlib

import msgspec

from tasuki_common import frames
from tasuki_common.messages import UNAVAILABLE, ErrorBody, ErrorResponse, Usage
from tasuki_gateway import failures
from tasuki_gateway.http_client import BrokenError, Response, UpstreamError

BUSY = (429, 503)
_DEADLINE = 504
_GOODBYE_SECONDS = 2.0
_STATUS_BY_TYPE = {failures.INVALID: 400, "timeout_error": 504, "overloaded_error": 503}
_usage_decoder = msgspec.json.Decoder(Usage)
_error_decoder = msgspec.json.Decoder(ErrorResponse)


class PodLost(Exception):  # noqa: N818 - an event of the relay, not an error of the request
    """The decode pod did not bring its stream to an end."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def unavailable(answer: bytes) -> bool:
    """Whether a pod that answers as a busy one does will not take the request later either."""
    try:
        return _error_decoder.decode(answer).error.code == UNAVAILABLE
    except msgspec.MsgspecError:
        return False


def refusal(status: int, answer: bytes) -> PodLost | failures.PodError:
    """Of an answer other than 200 and busy."""
    try:
        body = _error_decoder.decode(answer).error
    except msgspec.MsgspecError:
        body = ErrorBody(message=f"it answered {status}", type="server_error")
    if status >= 500 and status != _DEADLINE:
        return PodLost("refused", body.message)
    return failures.PodError(status, body)


async def ended(frame: frames.Frame, response: Response) -> Usage:
    """What the last frame of a stream says.

    Raises:
        PodLost: another pod is to go on.
        PodError: the request failed.
        BrokenError: the frame cannot be read.
    """
    if frame.kind is frames.Kind.DONE:
        response.allow(_GOODBYE_SECONDS)
        with contextlib.suppress(UpstreamError):  # all is here; a whole end lets us keep the line
            await response.read()
    try:
        if frame.kind is frames.Kind.DONE:
            return _usage_decoder.decode(frame.payload)
        error = _error_decoder.decode(frame.payload).error
    except msgspec.MsgspecError as unreadable:
        raise BrokenError(f"its last frame is unreadable ({unreadable}).") from unreadable
    if frame.kind is frames.Kind.RETRY:
        raise PodLost("retry", error.message)
    raise failures.PodError(_STATUS_BY_TYPE.get(error.type, 500), error)
