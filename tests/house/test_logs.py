"""Every log line is one JSON object of one shape, whoever wrote it."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tasuki_common import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    logs.setup("test", stream=stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_with_its_fields(stream: io.StringIO) -> None:
    logs.get("tasuki.x").info("request_done", request_id="r\n1", seconds=0.5, obj=object)
    (line,) = lines(stream)
    assert line["ts"].endswith("Z")
    assert (line["level"], line["component"], line["logger"]) == ("info", "test", "tasuki.x")
    assert (line["event"], line["request_id"], line["seconds"]) == ("request_done", "r\n1", 0.5)


def test_what_all_lines_of_a_process_say_stands_on_each(stream: io.StringIO) -> None:
    logs.setup("decode", stream=stream, deployment="models/granite", empty="")
    logs.get("tasuki.x").info("x", deployment="other")
    (line,) = lines(stream)
    assert (line["component"], line["deployment"]) == ("decode", "models/granite")
    assert line["deployment_"] == "other"
    assert "empty" not in line


def test_a_percent_sign_in_an_event_is_kept(stream: io.StringIO) -> None:
    logs.get("tasuki.x").warning("100%s")
    assert lines(stream)[0]["event"] == "100%s"


def test_a_field_never_hides_the_frame_of_the_line(stream: io.StringIO) -> None:
    logs.get("tasuki.x").info("x", level="high", component="engine")
    (line,) = lines(stream)
    assert (line["level"], line["level_"]) == ("info", "high")
    assert (line["component"], line["component_"]) == ("test", "engine")


def test_levels_below_the_set_one_are_silent(stream: io.StringIO) -> None:
    logs.get("tasuki.x").debug("detail")
    assert lines(stream) == []


def test_an_exception_keeps_its_traceback_in_one_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        logs.get("tasuki.x").exception("failed", request_id="r1")
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert "ValueError: wrong" in line["traceback"]


def test_other_libraries_and_warnings_get_the_same_shape(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old thing", stacklevel=1)
    started, warned = lines(stream)
    assert (started["event"], started["logger"]) == ("Started server process [7]", "uvicorn.error")
    assert "old thing" in warned["event"]
