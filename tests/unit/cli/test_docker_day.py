"""Filters, detach keys, logs and what is shown after attaching again: the pure parts of Docker's verbs."""

import os
import struct

import pytest

from recess.cli import terminal
from recess.cli.machine_flags import parse_labels
from recess.cli.terminal import DETACH, KeyMatcher, Seen, parse_keys
from recess.cli.verbs.logs import Stamped, parse_framed
from recess.cli.verbs.ps import parse_filters, passes, ports_of, shown, status_of
from recess.cli.verbs.watch import event_line, usage
from recess.errors import BadInput, ServerUnavailable


def row(**changes):
    spec = {"image": "base", "argv": ["sleep", "1"], "labels": {"a": "1", "b": ""}}
    base = {
        "id": "mch_x", "name": "dev-web", "state": "running", "exit_code": None, "created": 0.0, "session": "",
        "template": "", "spec": spec, "meta": {"ports": [["127.0.0.1", 8080, 80]]},
    }  # fmt: skip
    return base | changes


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((), True),
        (("name=web",), True),
        (("name=^dev-web$",), True),
        (("name=other", "name=dev"), True),
        (("name=other",), False),
        (("label=a=1", "status=running"), True),
        (("label=a=2",), False),
        (("label=b",), True),
        (("status=exited",), False),
        (("ancestor=base", "id=mch_x"), True),
        (("exited=0",), False),
    ],
)
def test_filters(filters, expected):
    assert passes(row(), parse_filters(filters)) is expected


@pytest.mark.parametrize("text", ["name", "colour=red"])
def test_unknown_filters_are_refused(text):
    with pytest.raises(BadInput, match="filter"):
        parse_filters((text,))


def test_the_reason_for_a_driver_is_shown_with_whole_commands():
    told = row(driver="gvisor", meta={"driver_why": "it was asked for"})
    assert shown(told, whole=True)["Driver"] == "gvisor (it was asked for)"
    assert shown(told, whole=False)["Driver"] == "gvisor"
    assert shown(row(driver="qemu"), whole=True)["Driver"] == "qemu"  # of before reasons were kept


def test_words_of_states_and_ports():
    assert status_of(row(state="exited", exit_code=3)) == "Exited (3)"
    assert status_of(row(state="dead")) == "Exited (137)"
    assert status_of(row(state="suspended")) == "Suspended"
    assert ports_of(row()) == ["127.0.0.1:8080->80/tcp"]
    assert ports_of(row(state="suspended")) == []
    sockets = {"ports": [["/a.sock", 0, 80], ["127.0.0.1", 8080, "/b.sock"]]}
    assert ports_of(row(meta=sockets)) == ["/a.sock->80/tcp", "127.0.0.1:8080->/b.sock"]


@pytest.mark.parametrize(("text", "keys"), [("", DETACH), ("ctrl-p,ctrl-q", DETACH), ("ctrl-],x", b"\x1dx")])
def test_detach_keys(text, keys):
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-ab", "xy", "ctrl-1"])
def test_bad_detach_keys(text):
    with pytest.raises(BadInput, match="detach-keys"):
        parse_keys(text)


def test_keys_are_found_in_pieces_and_what_may_become_them_is_held_back():
    matcher = KeyMatcher(DETACH)
    assert matcher.feed(b"ls\x10") == (b"ls", False)
    assert matcher.feed(b"x") == (b"\x10x", False)
    assert matcher.feed(b"\x10") == (b"", False)
    assert matcher.feed(b"\x11gone") == (b"", True)
    assert KeyMatcher(DETACH).feed(b"a\x10\x11") == (b"a", True)


def test_after_attaching_again_only_what_is_new_is_shown(monkeypatch):
    written = []
    monkeypatch.setattr(terminal, "_write_all", lambda number, data: written.append((number, bytes(data))))
    seen = Seen()
    seen(1, b"hello ")
    seen(2, b"err")
    seen.again()
    seen(1, b"hello wor")
    seen(2, b"err")
    seen(1, b"ld")
    assert b"".join(data for number, data in written if number == 1) == b"hello world"
    assert b"".join(data for number, data in written if number == 2) == b"err"
    seen.again()
    seen(0, b"")  # the ring has lost its beginning
    seen(1, b"rld!")
    assert written[-1] == (1, b"rld!")


def framed(*pieces, totals=(0, 0)):
    records = b"".join(struct.pack("<BI", stream, len(data)) + data for stream, data in pieces)
    return records + struct.pack("<BIQQ", 0xFF, 16, *totals)


def test_logs_tell_the_streams_apart():
    data = framed((1, b"one\ntw"), (2, b"bad\n"), (1, b"o\n"), totals=(8, 4))
    pieces, totals = parse_framed(data)
    assert totals == (8, 4)
    assert pieces == [(1, b"one\ntw"), (2, b"bad\n"), (1, b"o\n")]
    with pytest.raises(ServerUnavailable):
        parse_framed(data[:-5])


def test_what_comes_later_has_its_time_before_each_line():
    written = []
    stamped = Stamped(
        [(1, b"kept\nunfin")], lambda: 1_700_000_000_000_000_000, lambda n, data: written.append((n, data))
    )
    stamped(1, b"ished\nnext\nhalf")
    stamped(2, b"err\n")
    stamped(1, b" done\n")
    time = b"2023-11-14T22:13:20.000000000Z "
    assert written == [
        (1, b"ished\n" + time + b"next\n" + time + b"half"),
        (2, time + b"err\n"),
        (1, b" done\n"),
    ]


def test_figures_are_of_the_time_between_two_samples():
    def sample(cpu):
        return row(spec={"memory_bytes": 100}, stats={"cpu_s": cpu, "pss_bytes": 7, "private_bytes": 3})

    assert usage(sample(2.5), sample(2.0), 2.0)["cpu_percent"] == 25.0
    assert usage(sample(2.5), None, 2.0)["cpu_percent"] == 0.0


def test_an_event_is_a_line():
    line = event_line(
        {"ts": 0.0, "action": "die", "id": "mch_x", "name": "dev", "details": {"exit_code": 3, "status": ""}}
    )
    assert line.endswith("die       mch_x dev  (exit_code=3)")


def test_a_label_may_be_a_bare_name():
    assert parse_labels(("a=1", "b")) == {"a": "1", "b": ""}


def test_output_goes_to_our_own_streams(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(terminal.os, "write", lambda number, data: (os.writev(write, [data]), len(data))[1])
    terminal.show(0, b"from nowhere")
    assert os.read(read, 100) == b"from nowhere"
    os.close(read)
    os.close(write)
