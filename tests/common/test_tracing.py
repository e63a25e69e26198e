"""Tracing costs nothing where nobody asked for it, and says what it lacks where somebody did."""

import subprocess
import sys

import pytest

from tasuki_common import tracing

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def run(program: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    variables = {"PYTHONPATH": ":".join(sys.path), **environment}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_an_endpoint_nothing_is_imported_and_headers_are_empty() -> None:
    program = """
import sys
from tasuki_common import tracing
tracing.setup("gateway")
with tracing.span("request", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01") as leg:
    leg.note(status=200)
    print(repr(leg.header))
tracing.start("prefix").end()
assert not any(name.startswith("opentelemetry") for name in sys.modules)
"""
    assert run(program) == "''\n"


def test_an_endpoint_without_the_package_is_a_sentence() -> None:
    program = """
import sys
sys.modules["opentelemetry.sdk"] = None
from tasuki_common import tracing
from tasuki_common.errors import ConfigError
try:
    tracing.setup("gateway")
except ConfigError as error:
    print(error)
"""
    said = run(program, **{ENDPOINT: "http://127.0.0.1:1"})
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in said
    assert "install tasuki[tracing]" in said


def test_an_error_that_leaves_a_span_goes_on() -> None:
    with pytest.raises(ValueError, match="as before"), tracing.span("request"):
        raise ValueError("as before")
