"""How errors look to a client: an HTTP status and OpenAI's error object."""

import math
from typing import NamedTuple

from tasuki_common.errors import (
    DeadlineError,
    NotFoundError,
    OverloadedError,
    RequestError,
    TasukiError,
)
from tasuki_common.messages import ErrorBody, ErrorResponse

INVALID = "invalid_request_error"


class PodError(TasukiError):
    """A pod ended the request on its own terms; the client gets what the pod said."""

    def __init__(self, status: int, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.status = status
        self.body = body


class AuthenticationError(TasukiError):
    """The client showed no valid API key (HTTP 401)."""


class TooManyRequestsError(TasukiError):
    """The gateway's own limit of requests in flight is reached (HTTP 429)."""


class BodyTooLargeError(TasukiError):
    """The body is larger than the gateway takes (HTTP 413)."""


class Failure(NamedTuple):
    """An error answer."""

    status: int
    body: ErrorResponse
    headers: tuple[tuple[bytes, bytes], ...] = ()


def failure(error: Exception) -> Failure:
    """The answer for `error`; what is not one of ours is a 500 that tells nothing of the inside."""
    match error:
        case PodError():
            return Failure(error.status, ErrorResponse(error=error.body))
        case RequestError():
            return _failure(400, error, INVALID, param=error.param)
        case NotFoundError():
            return _failure(404, error, INVALID, param="model", code="model_not_found")
        case AuthenticationError():
            return _failure(401, error, INVALID, code="invalid_api_key")
        case BodyTooLargeError():
            return _failure(413, error, INVALID)
        case TooManyRequestsError():
            return _failure(429, error, "rate_limit_error", code="rate_limit_exceeded", retry=1.0)
        case OverloadedError():
            return _failure(
                503, error, "overloaded_error", code="overloaded", retry=error.retry_after
            )
        case DeadlineError():
            return _failure(504, error, "timeout_error", code="deadline_exceeded")
        case _:
            internal = TasukiError("The gateway failed on this request; its log has the reason.")
            return _failure(500, internal, "server_error")


def _failure(
    status: int,
    error: Exception,
    kind: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry: float | None = None,
) -> Failure:
    headers = () if retry is None else ((b"retry-after", b"%d" % max(1, math.ceil(retry))),)
    body = ErrorBody(message=str(error), type=kind, param=param, code=code)
    return Failure(status, ErrorResponse(error=body), headers)
