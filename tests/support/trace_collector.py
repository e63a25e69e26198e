"""An OTLP collector, as far as keeping the spans it is sent."""

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

LEGS = {
    ("tasuki-gateway", "request"): None,
    ("tasuki-gateway", "prefill"): "request",
    ("tasuki-prefill", "prefix"): "prefill",
    ("tasuki-gateway", "decode"): "request",
    ("tasuki-decode", "generate"): "decode",
    ("tasuki-decode", "hand_over"): "generate",
}
"""(service, span) of a request that is handed over, and the span it is a part of."""
WAIT_SECONDS = 30.0


class Seen(NamedTuple):
    """One span as it arrived."""

    service: str
    name: str
    trace: bytes
    span: bytes
    parent: bytes
    begun: float
    seconds: float
    attributes: dict[str, object]


class Collector:
    """`url` is what OTEL_EXPORTER_OTLP_ENDPOINT takes; `spans` what has arrived."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Seen] = []

    def legs(self, request_id: str) -> dict[tuple[str, str], Seen]:
        """The spans of a request's one trace, by service and name, when all of LEGS are here."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            spans = list(self.spans)
            mine = {s.trace for s in spans if s.attributes.get("tasuki.request_id") == request_id}
            found = {(s.service, s.name): s for s in spans if s.trace in mine}
            if found.keys() >= LEGS.keys():
                assert len(mine) == 1
                return found
            assert time.monotonic() < deadline, sorted(found)
            time.sleep(0.1)

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
                        span.start_time_unix_nano / 1e9,
                        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
                        {item.key: _value(item.value) for item in span.attributes},
                    )
                    for span in scope.spans
                ]


def check_parents(found: dict[tuple[str, str], Seen]) -> None:
    """Every leg is there once, under its parent, and not begun before it.

    A pod's leg may end after the gateway's that it belongs to: its last bytes are out before.
    """
    assert found.keys() == LEGS.keys()
    spans = {span.name: span for span in found.values()}
    for (_, name), parent in LEGS.items():
        assert spans[name].parent == (spans[parent].span if parent else b""), name
        if parent:
            assert spans[parent].begun <= spans[name].begun, name


@contextlib.contextmanager
def collecting(address: str = "127.0.0.1") -> Iterator[Collector]:
    """Listens on a free port of `address` while the block runs."""

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

    with http.server.ThreadingHTTPServer((address, 0), Handler) as server:
        collector = Collector(f"http://{address}:{server.server_address[1]}")
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
