"""An OTLP collector on a loopback port, as far as keeping the spans it is sent."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Seen(NamedTuple):
    """One span as it arrived."""

    service: str
    name: str
    trace: bytes
    span: bytes
    parent: bytes
    seconds: float
    attributes: dict[str, object]


class Collector:
    """`url` is what OTEL_EXPORTER_OTLP_ENDPOINT takes; `spans` what has arrived."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Seen] = []

    def take(self, data: bytes) -> None:
        """One export."""
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            known = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [
                    Seen(
                        known["service.name"],
                        span.name,
                        span.trace_id,
                        span.span_id,
                        span.parent_span_id,
                        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                        {item.key: _value(item.value) for item in span.attributes},
                    )
                    for span in scope.spans
                ]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Listens while the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                raise AssertionError("the test's collector reads plain bodies")
            collector.take(data)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """No line per request."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join(10)


def _value(value: object) -> object:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]
    return getattr(value, kind)
