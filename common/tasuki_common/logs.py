"""Logs: one JSON object a line on standard error, one line an event.

    log = logs.get("tasuki.gateway")
    log.info("request_done", request_id=request_id, seconds=seconds)

gives {"ts":"2026-01-31T12:00:00.000Z","level":"info","component":"gateway","logger":
"tasuki.gateway","event":"request_done","request_id":"…","seconds":0.1}. An event's name is a
constant, what varies is a field. Lines of other libraries get the same shape, their text as event.
"""

import datetime
import logging
import sys
from typing import Any, Literal, TextIO

import msgspec

Level = Literal["debug", "info", "warning", "error"]

_FIELDS = "tasuki_fields"
_OWN_HANDLERS = ("uvicorn", "uvicorn.error", "uvicorn.access")
_CHATTY = ("httpx", "httpcore", "uvicorn.access", "asyncio")


class EventLog:
    """A logger whose lines are an event's name and its fields; cheap when the level is off."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: Any) -> None:
        """What only a developer asks for."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """What an operator wants to find later."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """What went wrong and was made good."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """What went wrong for someone."""
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error with the traceback of the exception being handled."""
        self._write(logging.ERROR, event, fields, exc_info=True)

    def _write(
        self, level: int, event: str, fields: dict[str, Any], *, exc_info: bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", event, exc_info=exc_info, extra={_FIELDS: fields})


def get(name: str) -> EventLog:
    """The event log of one part of the program, e.g. "tasuki.gateway"."""
    return EventLog(logging.getLogger(name))


def setup(
    component: str, level: Level = "info", stream: TextIO | None = None, **fields: str
) -> None:
    """Sends all logs of this process to `stream` (standard error) as JSON lines.

    `fields` stand on each of them, but for empty ones. Called once at start; servers are then run
    without a log configuration of their own.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    frame = {"component": component} | {name: text for name, text in fields.items() if text}
    handler.setFormatter(_JsonLines(frame))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _OWN_HANDLERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


class _JsonLines(logging.Formatter):
    def __init__(self, frame: dict[str, str]) -> None:
        super().__init__()
        self._frame = frame
        self._encoder = msgspec.json.Encoder(enc_hook=str)

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _timestamp(record.created),
            "level": record.levelname.lower(),
            **self._frame,
            "logger": record.name,
            "event": record.getMessage(),
        }
        for key, value in getattr(record, _FIELDS, {}).items():
            line[f"{key}_" if key in line else key] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return self._encoder.encode(line).decode()


def _timestamp(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
