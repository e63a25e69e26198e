"""One request's way through gateway and pods, as an OpenTelemetry trace; off unless asked for.

    with tracing.span("prefill", pod=name) as leg:
        send(PrefillRequest(..., trace=leg.header))

A span's parent is the one around it in the same task or, for what comes from another process, the
header that came along. On when OTEL_EXPORTER_OTLP_ENDPOINT is set; OpenTelemetry's own variables
(sampler, headers, resource) count. Off, a span costs a function call and nothing is imported.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tasuki_common.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.trace import Span as OtelSpan, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_tracer: "Tracer | None" = None


class Span:
    """One leg of a request."""

    def __init__(self, span: "OtelSpan | None") -> None:
        self._span = span

    @property
    def header(self) -> str:
        """W3C `traceparent` for whoever does a part of this leg; empty when off."""
        if self._span is None:
            return ""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def note(self, **attributes: str | int | float | bool) -> None:
        """What is known of the leg by now; names are prefixed with `tasuki.`."""
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def end(self) -> None:
        """For spans of `start`."""
        if self._span is not None:
            self._span.end()


_OFF = Span(None)


def setup(component: str, instance: str = "") -> None:
    """Begins to export where the environment says so; once, at a process's start.

    Raises:
        ConfigError: an endpoint is set, but OpenTelemetry is not installed.
    """
    global _tracer
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{_ENDPOINTS[0]} is set, and {error.name} is missing: install tasuki[tracing]."
        ) from error
    version = importlib.metadata.version("tasuki")
    attributes = {"service.name": f"tasuki-{component}", "service.version": version}
    if instance:
        attributes["service.instance.id"] = instance
    provider = TracerProvider(resource=Resource.create(attributes))  # its atexit hook flushes
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("tasuki", version)


@contextlib.contextmanager
def span(name: str, parent: str = "", **attributes: str | int | float | bool) -> Iterator[Span]:
    """A leg that lasts as long as the block; an exception that leaves it is noted."""
    if _tracer is None:
        yield _OFF
        return
    made = _tracer.start_as_current_span(
        name, context=_context(parent), attributes=_named(attributes)
    )
    with made as current:
        yield Span(current)


def start(name: str, parent: str = "", **attributes: str | int | float | bool) -> Span:
    """A leg that ends elsewhere, by `Span.end`."""
    if _tracer is None:
        return _OFF
    return Span(_tracer.start_span(name, context=_context(parent), attributes=_named(attributes)))


def _context(parent: str) -> Any:
    """Of a `traceparent` from outside, a new trace when it is none; None: what is current here."""
    if not parent:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"tasuki.{name}": value for name, value in attributes.items()}
