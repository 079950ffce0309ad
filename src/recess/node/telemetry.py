"""Spans of sessions to an OpenTelemetry collector, by the SDK's own exporter: the optional extra `recess[otel]`.

It is on when OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) is set; the exporter reads the rest of OTEL_EXPORTER_OTLP_* itself
(headers, certificate, timeout). Without the packages the server runs on and says so once. A collector that is down holds
nobody up: spans wait in a bounded queue of the SDK's own thread, and the oldest are dropped. It must not decide what a span is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from recess.contextlog.contract import Entry
from recess.sessions.spans import Span, SpanMaker
from recess.version import __version__

log = logging.getLogger(__name__)

NS = 1_000_000_000
MISSING = "traces are asked for (OTEL_EXPORTER_OTLP_ENDPOINT) and not sent: pip install 'recess[otel]'"


class Sink(Protocol):
    """What takes finished spans: a span processor of the SDK."""

    def on_end(self, span: Any) -> None:
        """Take one; returns at once."""
        ...

    def shutdown(self) -> None:
        """Send what waits, bounded, and end."""
        ...


class Traces:
    """An `Observer` that hands the spans of sessions to a sink."""

    def __init__(self, sink: Sink, node: str) -> None:
        self._maker = SpanMaker()
        self._sink = sink
        self._readable = _maker_of_readable(node)

    def taken_up(self, session: str, entries: Sequence[Entry]) -> None:
        """Learn what is open; nothing is sent."""
        self._maker.taken_up(session, entries)

    def saw(self, session: str, entry: Entry) -> None:
        """Send what this entry ends."""
        for span in self._maker.saw(session, entry):
            self._sink.on_end(self._readable(span))

    def close(self) -> None:
        """Send what waits."""
        self._sink.shutdown()


def open_traces(endpoint: str, node: str) -> Traces | None:
    """Return an observer that exports, None when none is asked for or the packages are not there (which is logged)."""
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning(MISSING)
        return None
    return Traces(BatchSpanProcessor(OTLPSpanExporter()), node)


def _maker_of_readable(node: str) -> Any:
    """Return a function from our span to the SDK's finished one. Ids and times are ours, so no tracer makes it."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    resource = Resource.create({"service.name": "recess", "service.version": __version__, "service.instance.id": node})
    scope = InstrumentationScope("recess", __version__)
    sampled = TraceFlags(TraceFlags.SAMPLED)

    def readable(span: Span) -> Any:
        parent = SpanContext(span.trace, span.parent, False, sampled) if span.parent else None
        return ReadableSpan(
            name=span.name, context=SpanContext(span.trace, span.ident, False, sampled), parent=parent,
            resource=resource, attributes=dict(span.attributes), kind=SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.OK),
            start_time=int(span.begun_s * NS), end_time=int(span.ended_s * NS), instrumentation_scope=scope,
        )  # fmt: skip

    return readable
