"""The small files of the machines room: states, identity, records, output log, ports, incoming streams."""

from __future__ import annotations

import asyncio
import struct

import pytest

from recess.drivers.fake.streams import stream_pair
from recess.errors import Conflict, Corrupt, GuestFailed, IllegalState, InvalidSpec
from recess.machines import identity, states
from recess.machines.forward import Forwarder
from recess.machines.incoming import Incoming
from recess.machines.live import needs_clock
from recess.machines.mapped import file_part
from recess.machines.outputlog import FILE_BYTES_MAX, OutputLog, Piece, Said, pack_said, read_output
from recess.machines.records import spec_from_json, spec_to_json
from recess.machines.service import MachineSpec

# --- states ------------------------------------------------------------------------------------------------------


def test_every_move_of_the_table_is_legal_exactly_where_it_says():
    for move, table in states.MOVES.items():
        for state in states.STATES:
            if state in table:
                assert states.next_state(state, move) == table[state]
                assert table[state] in (*states.STATES, "")
            else:
                with pytest.raises(IllegalState, match=f"is {state}: cannot {move}") as caught:
                    states.next_state(state, move)
                assert caught.value.hint


@pytest.mark.parametrize(
    ("state", "snapshot", "after"),
    [("running", "snp_1", "suspended"), ("paused", "", "dead"), ("creating", "snp_1", "dead")],
)
def test_where_a_lost_machine_falls(state, snapshot, after):
    found, line = states.after_loss(state, snapshot, "killed by signal 9")
    assert found == after
    assert "killed by signal 9" in line


# --- identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "host"),
    [("dev", "dev"), ("My_Box.1", "my-box-1"), ("-x-", "x"), ("___", "machine"), ("a" * 100, "a" * 63)],
)
def test_hostnames(name, host):
    assert identity.hostname_of(name) == host


def test_every_thaw_is_fresh_but_a_machine_keeps_its_id():
    thaws = [identity.make_thaw("mch_1", "dev", 3, {}, 1.5) for _ in range(2)]
    assert thaws[0].entropy != thaws[1].entropy
    assert thaws[0].generation != thaws[1].generation
    assert thaws[0].machine_id == thaws[1].machine_id
    assert identity.make_thaw("mch_2", "dev", 3, {}, 1.5).machine_id != thaws[0].machine_id
    assert (thaws[0].wall_ns, thaws[0].epoch, len(thaws[0].entropy)) == (1_500_000_000, 3, 32)


def test_guest_env_lets_the_user_win():
    spec = MachineSpec(network="none", env={"RECESS_NAME": "mine", "A": "b"})
    env = identity.guest_env("mch_1", "dev", "ses_1", spec)
    assert env["RECESS_NETWORK"] == "none"
    assert (env["RECESS_NAME"], env["A"], env["RECESS_SESSION"]) == ("mine", "b", "ses_1")


def test_a_drifting_clock_is_set():
    assert not needs_clock(0.0, 0.025)
    assert needs_clock(0.09, 0.025)


# --- records -----------------------------------------------------------------------------------------------------


def test_specs_survive_json():
    spec = MachineSpec(argv=("a", "b"), env={"K": "v"}, ports=(("127.0.0.1", 1, 2),), routes={"llm": "http://x"})
    assert spec_from_json(spec_to_json(spec), "row") == spec


@pytest.mark.parametrize("bad", [{"memory_bytes": "much"}, {"ports": [["x"]]}, {"env": [1]}])
def test_a_lying_row_is_corrupt(bad):
    with pytest.raises(Corrupt, match="machine mch_1"):
        spec_from_json(spec_to_json(MachineSpec()) | bad, "machine mch_1")


# --- output log --------------------------------------------------------------------------------------------------


def kept(directory):
    return read_output(directory).data


def test_output_survives_reopening_and_a_torn_record(tmp_path):
    log = OutputLog(tmp_path)
    log.append(1, b"one\n", 10)
    log.append(2, b"two\n", 10)
    with (tmp_path / "output.log").open("ab") as file:
        file.write(b"\x01\xff\x00\x00\x00half")
    again = OutputLog(tmp_path)
    assert again.totals == {1: 4, 2: 4}
    again.append(1, b"three\n", 20)
    assert read_output(tmp_path).pieces == [Piece(1, b"one\n", 10), Piece(2, b"two\n", 10), Piece(1, b"three\n", 20)]
    assert OutputLog(tmp_path).totals == {1: 10, 2: 4}


def test_output_is_capped_and_still_counted_and_timed(tmp_path):
    log = OutputLog(tmp_path)
    piece = bytes(1 << 20)
    for _ in range(11):
        log.append(1, piece, 7)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size <= 2 * (FILE_BYTES_MAX + (1 << 20)) + 100
    assert OutputLog(tmp_path).totals[1] == 11 << 20
    assert {piece.at_ns for piece in read_output(tmp_path).pieces} == {7}  # each file knows it of itself


def test_a_new_run_counts_from_zero_and_keeps_what_was_said(tmp_path):
    log = OutputLog(tmp_path)
    log.new_run()
    log.append(1, b"first\n", 1)
    log.new_run()
    log.append(2, b"second\n", 2)
    assert OutputLog(tmp_path).totals == {1: 0, 2: 7}
    said = read_output(tmp_path)
    assert kept(tmp_path) == b"first\nsecond\n"
    assert pack_said(said).startswith(struct.pack("<BI", 1, 6) + b"first\n" + struct.pack("<BI", 2, 7))
    assert pack_said(said).endswith(struct.pack("<BIQQ", 0xFF, 16, 0, 7))
    for _ in range(5):
        log.append(1, bytes(1 << 20), 3)
    log.append(1, b"x", 3)
    assert pack_said(read_output(tmp_path)).endswith(struct.pack("<QQ", (5 << 20) + 1, 7))


def test_a_log_of_before_there_were_times_is_read_and_goes_on(tmp_path):
    heading = struct.pack("<BIQQ", 0xFF, 16, 0, 0)
    (tmp_path / "output.log").write_bytes(heading + struct.pack("<BI", 1, 4) + b"old\n")
    OutputLog(tmp_path).append(1, b"new\n", 5)
    assert read_output(tmp_path) == Said([Piece(1, b"old\n", 0), Piece(1, b"new\n", 5)], 8, 0)


def test_a_record_of_a_wrong_length_ends_the_log(tmp_path):
    log = OutputLog(tmp_path)
    log.append(1, b"one\n", 5)
    with (tmp_path / "output.log").open("ab") as file:
        file.write(struct.pack("<BI", 0xFE, 3) + b"abc" + struct.pack("<BI", 1, 4) + b"two\n")
    assert kept(tmp_path) == b"one\n"
    assert OutputLog(tmp_path).totals == {1: 4, 2: 0}


def test_no_output(tmp_path):
    assert read_output(tmp_path / "nowhere") == Said([], 0, 0)


# --- sparse files ------------------------------------------------------------------------------------------------


def test_file_part_finds_every_page_that_is_not_zero(tmp_path):
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        for page in (0, 7, 255):
            file.seek(page * 4096 + 100)
            file.write(b"x")
        file.seek(9 * 4096)
        file.write(bytes(4096))
    part = file_part("memory", path)
    assert part.pages_total == 256
    assert part.indices.tolist() == [0, 7, 255]
    assert part.data[1].tobytes() == bytes(100) + b"x" + bytes(3995)
    (tmp_path / "odd").write_bytes(b"x")
    with pytest.raises(Corrupt):
        file_part("memory", tmp_path / "odd")


# --- ports -------------------------------------------------------------------------------------------------------


class OneServer:
    """A link whose guest serves one port: it answers in capitals."""

    def __init__(self):
        self.served: set[asyncio.Task] = set()

    async def dial(self, port, host="127.0.0.1"):
        if port != 80:
            raise GuestFailed("connection refused")
        ours, theirs = stream_pair()

        async def serve():
            while data := await theirs.read():
                await theirs.write(data.upper())
            await theirs.close_write()

        self.served.add(asyncio.create_task(serve()))
        return ours


async def test_forwarding_both_ways_and_hanging_up():
    server = OneServer()

    async def link():
        return server

    forwarder = Forwarder(link)
    web, dead = await forwarder.start([("127.0.0.1", 0, 80), ("127.0.0.1", 0, 81)])
    reader, writer = await asyncio.open_connection(*web[:2])
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read() == b"HELLO"
    writer.close()
    reader, other = await asyncio.open_connection(*dead[:2])
    assert await reader.read() == b""
    other.close()
    with pytest.raises(Conflict):
        await Forwarder(link).start([web])
    moved = Forwarder(link)
    assert (await moved.start([web], fall_back=True))[0][1] != web[1]
    await moved.stop()
    with pytest.raises(InvalidSpec):
        await Forwarder(link).start([("203.0.113.9", 0, 80)])
    await forwarder.stop()
    await forwarder.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*web[:2])


# --- incoming ----------------------------------------------------------------------------------------------------


async def test_a_stream_nobody_serves_is_closed_after_a_bounded_wait():
    table = Incoming(wait_s=0.01)
    ours, theirs = stream_pair()
    await table.router("mch_1")("session", {}, theirs)
    assert await ours.read() == b""


async def test_handlers_are_per_machine_and_can_be_taken_away():
    table = Incoming(wait_s=0.01)
    heard = []

    async def handler(service, metadata, stream):
        heard.append((service, metadata))

    table.set("mch_1", "session", handler)
    _, stream = stream_pair()
    await table.router("mch_1")("session", {"n": 1}, stream)
    await table.router("mch_2")("session", {"n": 2}, stream)
    table.set("mch_1", "session", None)
    await table.router("mch_1")("session", {"n": 3}, stream)
    table.set("mch_1", "session", handler)
    table.forget("mch_1")
    await table.router("mch_1")("session", {"n": 4}, stream)
    assert heard == [("session", {"n": 1})]
