"""The pager: a process of its own per lazily restored machine, and the nursery that they are forked from.

The nursery is one small process per server, started before it is needed, with everything imported: a fork of it is
there in a few milliseconds. It has one thread, so forking is safe, and it ends when its server does. A pager does not:
it serves its machine until every page is there, server or not, and ends with the machine's VMM, whose pidfd it watches. The
machine's keeper watches the pager, by a pidfd and a pipe: "filled" is said there, or the keeper ends the machine.

    server -> nursery   {"home", "overrides", "snapshot", "part", "template", "files", "first", "keep"} + the pager's socket
    pager -> server     {"ready": runs, "bytes"} + a descriptor with the runs, the pager's pidfd     or {"failed": text}
    server -> pager     {"segments": [[address, first, pages]], "first": [pages], "whole"} + userfaultfd, pipe, the VMM's pidfd
    pager -> server     {"serving": true}, and at the end {"filled": report}      or {"failed": text}
                        with {"kept": {"ground", "pages"}} + a file with the pages that came, a descriptor with their runs
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recess.config import load_config
from recess.errors import RecessError
from recess.frames.pool import take_short_turns
from recess.node.pagereader import SnapshotPages
from recess.node.stores import open_for_reading
from recess.paging import FaultServer, Report, Segment, Uffd
from recess.paging.keptfile import KeptFile

MESSAGE_MAX = 65536
TOUCHED_MAX = 4096  # pages told of, each with its frame: up to 256 MiB, and a message that fits
FILLED = b"filled"
_TURN_S = 0.0001  # a fault is answered in less than a millisecond, beside threads that read and fill


def _receive(sock: socket.socket, fds: int) -> tuple[dict[str, Any] | None, list[int]]:
    """Return one message and its descriptors; None when the other side is gone."""
    data, got, _flags, _ = socket.recv_fds(sock, MESSAGE_MAX, fds, socket.MSG_CMSG_CLOEXEC)
    return (json.loads(data) if data else None), got


def _say(sock: socket.socket, message: dict[str, Any], fds: list[int] | None = None) -> None:
    """Tell the server, if it is still there: a pager does its work without one, too."""
    with contextlib.suppress(OSError):
        socket.send_fds(sock, [json.dumps(message).encode()], fds or [], socket.MSG_NOSIGNAL)


def serve_snapshot(sock: socket.socket, order: dict[str, Any]) -> None:
    """Be the pager of one machine. Returns when every page is there, or the machine is gone. Raises whatever fails."""
    config = load_config(home=order["home"], **order["overrides"])
    files = {digest: Path(path) for digest, path in order["files"].items()}
    library = SnapshotPages(
        open_for_reading(config),
        order["snapshot"],
        order["part"],
        Path(order["template"]),
        files,
        far=bool(config.store),
    )
    runs = library.ranges()
    fds = [_ranges_file(runs), os.pidfd_open(os.getpid())]
    try:
        _say(sock, {"ready": len(runs) // 8, "bytes": library.stored_bytes}, fds)
    finally:
        for fd in fds:
            os.close(fd)
    _ = library.book  # made while the server has the runs registered
    expected = [*order["first"], *library.first_pages]
    # Planned and read while the machine starts, and beside everything else: it waits for none of it.
    ahead = threading.Thread(target=_expect, args=(library, expected), name="expect", daemon=True)
    ahead.start()
    message, fds = _receive(sock, 3)
    if message is None:
        return
    uffd, pipe, vmm = fds
    if message["whole"]:
        ahead.join()  # it looks up groups, and they are numbered anew
        library.take_all()
    segments = [Segment(*numbers) for numbers in message["segments"]]
    kept = None if message["whole"] else _kept_file(library, order)
    server = FaultServer(
        Uffd(uffd, segments, protect=not message["whole"]), library.book, library, owner=vmm,
        first=_first(ahead, library, [*message["first"], *expected]), fill_groups=library.fill_groups,
        keep=None if kept is None else kept.keep,
    )  # fmt: skip
    _say(sock, {"serving": True})
    report = server.run()
    with contextlib.suppress(BrokenPipeError):  # the keeper is gone with its machine
        os.write(pipe, FILLED)
    filled: dict[str, Any] = {"filled": about(report, library)}
    # A machine that was ended before every page was there is no error, but what was written down then has holes.
    if kept is None or kept.fd < 0 or report.groups != library.book.groups:
        _say(sock, filled)
    else:
        where = {"ground": library.template_id, "pages": library.pages_total}
        _say(sock, {**filled, "kept": where}, [kept.fd, _ranges_file(library.book.ranges())])


def _expect(library: SnapshotPages, pages: list[int]) -> None:
    """Begin to read what brings these pages."""
    library.prefetch(_groups(library, pages))


def _first(ahead: threading.Thread, library: SnapshotPages, pages: list[int]) -> Iterator[int]:
    """Yield the groups to bring first, once they are on their way. Looked up by who brings them: faults are answered before."""
    ahead.join()
    yield from _groups(library, pages)


def _kept_file(library: SnapshotPages, order: dict[str, Any]) -> KeptFile | None:
    """Return where to write down what is brought, if the server wants it and there is room."""
    keep = order.get("keep")
    if not keep:
        return None
    limits = {name: int(keep[name]) for name in ("max_bytes", "reserve_bytes")}
    return KeptFile(Path(keep["folder"]), library.book.pages, **limits)


def _ranges_file(runs: bytes) -> int:
    """Return a descriptor with absent runs."""
    fd = os.memfd_create("recess-absent", os.MFD_CLOEXEC)
    os.write(fd, runs)
    return fd


def _groups(library: SnapshotPages, pages: list[int]) -> list[int]:
    """Return the groups that bring these pages, each once; a page that is not absent brings none."""
    found = (library.book.group_of(page) for page in pages)
    return list(dict.fromkeys(group for group in found if group is not None))


def about(report: Report, library: SnapshotPages) -> dict[str, Any]:
    """Return a report as JSON data. `touched`: the first page of each group that was asked for, in that order."""
    touched = [int(library.first_page(group)) for group in report.touched[:TOUCHED_MAX]]
    return {**asdict(report), "touched": touched, "stored_bytes": library.stored_bytes}


def _pager(sock: socket.socket, order: dict[str, Any]) -> int:
    try:
        serve_snapshot(sock, order)
        return 0
    except RecessError as exc:
        _say(sock, {"failed": exc.message})
    except Exception as exc:
        _say(sock, {"failed": f"{type(exc).__name__}: {exc}"})
    return 1


def nursery(sock: socket.socket) -> None:
    """Fork a pager for each order, until the server is gone."""
    take_short_turns(_TURN_S)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    _say(sock, {"nursery": os.getpid()})
    while True:
        order, fds = _receive(sock, 1)
        if order is None:
            return
        pid = os.fork()
        if pid == 0:
            sock.close()
            os.setsid()
            code = 1
            try:
                with socket.socket(fileno=fds[0]) as own:
                    code = _pager(own, order)
            finally:
                os._exit(code)
        os.close(fds[0])


def main() -> None:
    """Entry point: the number of the socket's descriptor is the argument."""
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        nursery(sock)


if __name__ == "__main__":
    main()
