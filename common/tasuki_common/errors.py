"""The errors a request can end with, classed by what the caller must do.

    TasukiError
    ├── RequestError        the caller must change the request (HTTP 400)
    ├── NotFoundError       no such model (HTTP 404)
    ├── OverloadedError     try again later (HTTP 503 with Retry-After)
    │   └── UnavailableError    try another pod: this one loads, leaves, or has another model
    ├── DeadlineError       the request's own deadline passed (HTTP 504)
    └── ConfigError         whoever started this process must change its configuration

Each carries one sentence for the reader.
"""


class TasukiError(Exception):
    """Base of all errors that tasuki raises on purpose."""


class RequestError(TasukiError):
    """The request cannot be served as it stands; `param` names the field that is wrong."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NotFoundError(TasukiError):
    """The named model is not served here."""


class OverloadedError(TasukiError):
    """Admission limits are reached; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(OverloadedError):
    """A pod that takes no such requests now, however few it has: it loads or leaves, say."""


class DeadlineError(TasukiError):
    """The deadline of the request passed before it was done."""


class ConfigError(TasukiError):
    """The configuration cannot work; the message names the field and what to do."""
