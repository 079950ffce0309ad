"""Which blocks a bitmap names: numbers of byte ranges, and a server that lies or falls silent is a typed error at once."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recess.drivers.qemu import nbd
from recess.errors import DriverFailed, Timeout

SIZE = 64 * 4096
REPLY, CHUNK = 0x3E889045565A9, 0x668E33EF
CONTEXT = b"qemu:dirty-bitmap:changed"

Extents = list[tuple[int, int]]


def option(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY, number, kind, len(data)) + data


def status(extents: Extents, *, handle: int = 0, context: int = 5) -> bytes:
    data = struct.pack(">I", context) + b"".join(struct.pack(">II", *one) for one in extents)
    return struct.pack(">IHHQI", CHUNK, 1, 5, handle, len(data)) + data


def hello(*, size: int = SIZE, context: bytes = CONTEXT) -> list[bytes]:
    info = struct.pack(">HQH", 0, size, 3)
    return [
        b"NBDMAGICIHAVEOPT\0\3",
        option(8, 1),
        option(10, 4, struct.pack(">I", 5) + context) + option(10, 1),
        option(7, 3, info) + option(7, 1),
    ]


@pytest.fixture
def answer(tmp_path: Path) -> Callable[[list[bytes]], np.ndarray]:
    """Serve these bytes, each after the client's next request, and return what the client makes of them."""

    def ask(answers: list[bytes]) -> np.ndarray:
        server = socket.socket(socket.AF_UNIX)
        (tmp_path / "s").unlink(missing_ok=True)
        server.bind(str(tmp_path / "s"))
        server.listen(1)

        def serve() -> None:
            peer, _ = server.accept()
            with peer, contextlib.suppress(ConnectionError):  # it has heard enough
                peer.sendall(answers[0])
                for piece in answers[1:]:
                    if not peer.recv(4096):
                        return
                    peer.sendall(piece)
                while peer.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return nbd.dirty_blocks(tmp_path, "s", "capture", "changed", SIZE)
        finally:
            thread.join()
            server.close()

    return ask


def runs(*pairs: tuple[int, int]) -> list[int]:
    return nbd.numbers_of(np.array(pairs, np.int64).reshape(-1, 2)).tolist()


def test_ranges_are_numbers() -> None:
    assert runs() == []
    assert runs((0, 4096), (8192, 20480)) == [0, 2, 3, 4]
    assert runs((100, 200)) == [0]  # touched is changed
    assert runs((4000, 4200), (4200, 8192)) == [0, 1]


def test_a_server_is_asked_until_it_has_told_all(answer) -> None:
    first, second = [(4096, 0), (8192, 1), (4096, 2)], [(4096, 1), (SIZE, 3)]  # the last one reaches beyond the end
    found = answer([*hello(), status(first), status(second, handle=16384)])
    assert found.tolist() == [1, 2, *range(4, 64)]


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([b"SSH-2.0-OpenSSH_9.2p1"], "no NBD server"),
        ([b"NBDMAGICIHAVEOPT\0\3", option(8, 0x80000001, b"no such option")], "refuses NBD option 8: no such option"),
        ([b"NBDMAGICIHAVEOPT\0\3", option(7, 1)], "makes no sense"),
        ([b"NBDMAGICIHAVEOPT\0\3", struct.pack(">QIII", REPLY, 8, 3, 1 << 30)], "makes no sense"),
        ([b"NBDMAGICIHAVEOPT\0\3", option(8, 3) * 20], "makes no sense"),
        (hello(size=SIZE * 2), "another disk"),
        (hello(context=b"base:allocation"), "another disk, or no bitmap"),
        ([*hello(), status([(0, 1)])], "does not say"),
        ([*hello(), status([])], "does not say"),
        ([*hello(), status([(4096, 1), (512, 0)])], "does not say"),
        ([*hello(), status([(SIZE, 1)], handle=7)], "makes no sense"),
        ([*hello(), status([(SIZE, 1)], context=6)], "does not tell"),
        ([*hello(), struct.pack(">IHHQI", CHUNK, 1, 5, 0, 1 << 31)], "makes no sense"),
        ([*hello(), struct.pack(">IHHQI", CHUNK, 1, 0x8001, 0, 12) + struct.pack(">IH", 5, 6) + b"broken"], "broken"),
    ],
)
def test_what_makes_no_sense_is_a_typed_error(answer, answers: list[bytes], why: str) -> None:
    with pytest.raises(DriverFailed, match=why):
        answer(answers)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match="cannot be asked"):
        nbd.dirty_blocks(tmp_path, "absent", "capture", "changed", SIZE)


def test_a_server_that_falls_silent_is_a_timeout(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "TIMEOUT_S", 0.05)
    with pytest.raises(Timeout):
        answer(hello())
