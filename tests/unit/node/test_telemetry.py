"""Spans as the SDK sends them: to memory, and over HTTP to a collector that this test plays; figures as a scraper reads them."""

import asyncio
import sys

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from recess.api.exposition import HELP, expose
from recess.contextlog.contract import Entry
from recess.node import telemetry
from recess.node.telemetry import Traces, open_traces
from recess.sessions.counters import Counters, Sample
from recess.sessions.observing import Observers
from recess.sessions.spans import trace_id
from recess.testing.http_server import HttpResponse, LoopbackServer
from recess.testing.session_world import coder_world


def entry(position, kind, ts, turn=0, ref="", **body):
    return Entry("ses_a", position, kind, body, turn, ref, "", 1, "v1", ts, 1)


LIFE = [
    entry(2, "turn.start", 100.0, 1, inbox=1, attempt=1),
    entry(3, "tool.start", 102.5, 1, "c", name="sh", effect="local"),
    entry(4, "machine.snapshot", 110.0, figures={"durable_s": 0.5}, why="wait", away=True),
    entry(5, "machine.restore", 3710.0, seconds=0.25, rung=2, why="frozen"),
    entry(6, "tool.doubt", 3711.0, 1, "c", reason="?"),
    entry(7, "turn.end", 3712.0, 1, status="done"),
]


def test_the_sdk_takes_our_spans():
    memory = InMemorySpanExporter()
    traces = Traces(SimpleSpanProcessor(memory), "node-1")
    for one in LIFE:
        traces.saw("ses_a", one)
    traces.close()
    found = {one.name: one for one in memory.get_finished_spans()}
    assert set(found) == {"snapshot", "frozen", "thaw", "tool sh", "turn 1"}
    turn = found["turn 1"]
    assert turn.context.trace_id == trace_id("ses_a")
    assert turn.parent is None
    assert (turn.start_time, turn.end_time) == (100_000_000_000, 3_712_000_000_000)
    assert found["frozen"].parent.span_id == turn.context.span_id
    assert found["tool sh"].status.description == "outcome unknown"
    assert turn.resource.attributes["service.instance.id"] == "node-1"


class Collector(LoopbackServer):
    def __init__(self):
        super().__init__()
        self.spans = []

    async def answer(self, request):
        asked = ExportTraceServiceRequest.FromString(request.body)
        self.spans += [span for one in asked.resource_spans for scope in one.scope_spans for span in scope.spans]
        return HttpResponse(200, b"", "application/x-protobuf")


async def test_a_session_is_traced_across_its_freeze_to_a_collector(tmp_path):
    async with Collector() as collector:
        sent = InMemorySpanExporter()
        async with coder_world(tmp_path) as (w, s):
            w.observers.add(Traces(SimpleSpanProcessor(sent), "n"))
            await w.say(s, "one", turn=1)
            await w.until_state(s, "frozen")
            await w.crash_server()
            await w.say(s, "two", turn=2)
            await w.until_state(s, "frozen")
        exporter = OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces", compression=None)
        await asyncio.to_thread(exporter.export, sent.get_finished_spans())
        await asyncio.to_thread(exporter.shutdown)
    names = [span.name for span in collector.spans]
    assert {span.trace_id for span in collector.spans} == {trace_id(s).to_bytes(16)}, "one trace, over a restart"
    assert [name for name in names if name != "model"] == [
        "thaw", "turn 1", "snapshot", "frozen", "thaw", "turn 2", "snapshot",
    ]  # fmt: skip
    assert names.count("model") == 2


def test_off_without_an_endpoint_and_said_without_the_packages(monkeypatch, caplog):
    assert open_traces("", "n") is None
    assert caplog.text == ""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    assert open_traces("http://127.0.0.1:9", "n") is None
    assert telemetry.MISSING in caplog.text


async def test_figures_are_read_by_the_official_parser(tmp_path):
    counters = Counters()
    async with coder_world(tmp_path) as (w, s):
        w.observers.add(counters)
        await w.say(s, "one", turn=1)
        await w.until_state(s, "frozen")
    odd = Sample("recess_tool_calls_total", (("tool", 'a"b\\c\nd'),), 2.5)
    text = expose([*counters.samples(), odd])
    families = {one.name: one for one in text_string_to_metric_families(text)}
    assert families["recess_turns"].type == "counter"
    values = {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in families.values()
        for one in family.samples
    }
    assert values[("recess_turns_total", (("status", "done"),))] == 1
    assert values[("recess_thaws_total", (("rung", "5"),))] == 1
    assert values[("recess_tool_calls_total", (("tool", 'a"b\\c\nd'),))] == 2.5
    assert all(one.documentation for one in families.values())


def test_a_figure_without_a_word_about_it_is_refused():
    with pytest.raises(KeyError):
        expose([Sample("recess_nobody_knows", (), 1)])
    assert isinstance(Observers().saw("s", LIFE[0]), type(None))
    assert all(text.endswith(".") for text in HELP.values())
