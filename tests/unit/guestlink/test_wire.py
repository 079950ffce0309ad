import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.errors import BadInput, GuestFailed, IllegalState, NotFound, OutOfSpace, RecessError
from recess.guestlink import wire
from recess.guestlink.link import ExecRequest, Thaw


@given(st.binary(max_size=300), st.sampled_from([wire.Hello, wire.Reply, wire.JobRow, wire.Opened, list[wire.JobRow]]))
def test_whatever_the_guest_sends_is_a_record_or_guest_failed(data, kind):
    with contextlib.suppress(GuestFailed):
        assert isinstance(wire.decode(data, kind, "thing"), kind if isinstance(kind, type) else list)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 100_000, b'{"exit_code":"1"}', b'{"exit_code":1e400}', b"\xff"]
)
def test_malformed_bodies(data):
    with pytest.raises(GuestFailed):
        wire.decode(data, wire.Exited, "exit")
    with pytest.raises(GuestFailed):
        wire.decode(data[:200_000], dict[str, int], "thing")


@pytest.mark.parametrize(
    ("kind", "error"),
    [("not_found", NotFound), ("no_space", OutOfSpace), ("frozen", IllegalState), ("never heard", GuestFailed)],
)
def test_errors_are_typed_and_one_bounded_line(kind, error):
    made = wire.to_error(wire.Fault(kind, "a\nb\r" + "x" * 9000))
    assert type(made) is error
    assert made.message.startswith("a b x")
    assert len(made.message) <= 2000
    assert made.details["guest_kind"] == kind
    assert isinstance(made, RecessError)


def test_exit_codes_of_programs_that_did_not_start():
    assert wire.to_error(wire.Fault("no_program", "x")).details["exit_code"] == 127
    assert wire.to_error(wire.Fault("not_executable", "x")).details["exit_code"] == 126


def test_machine_ids_take_the_form_linux_wants():
    assert wire.linux_machine_id("ab" * 16) == "ab" * 16
    made = wire.linux_machine_id("mch_1")
    assert made == wire.linux_machine_id("mch_1") != wire.linux_machine_id("mch_2")
    assert len(made) == 32
    assert int(made, 16) >= 0


def test_bodies_are_json_with_all_fields():
    body = wire.exec_body(ExecRequest(["ls"], env={"A": "1"}, tty=True), 5)
    assert msgspec.json.decode(msgspec.json.encode(body))["stream"] == 5
    thaw = Thaw(1_764_000_000_123_456_789, bytes(range(32)), "g", 3, "h", "m", {})
    assert wire.thaw_body(thaw)["wall_ns"] == 1_764_000_000_123_456_789
    assert wire.thaw_body(thaw)["entropy"] == bytes(range(32)).hex()
    with pytest.raises(BadInput):
        wire.thaw_body(Thaw(1, b"short", "g", 3, "h", "m", {}))
