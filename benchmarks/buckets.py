"""A bucket on loopback for benchmarks, and how fast its server is by itself.

`s3s-fs` (crates.io) where it is installed, else `moto`, which the tests use: see docs/decisions/s3-test-server.md. The
first streams ranges from files and serves requests side by side; the second takes a whole object in hand for each range.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recess.blobs.s3 import RemoteSettings, open_bucket
from recess.units import MIB

FAST, SLOW = "s3s-fs", "moto"
KEY_ID, SECRET = "bench-key-id", "bench-secret"
START_S = 30.0
PROBE_BYTES, RANGE_BYTES, READS, AT_ONCE = 64 * MIB, 64 << 10, 64, 8


@dataclass(frozen=True)
class Bucket:
    """A bucket that is served."""

    server: str
    address: str
    endpoint: str

    @property
    def config(self) -> Mapping[str, str]:
        """Return what of a configuration reaches it."""
        return {
            "store": f"{self.address}/store", "s3_endpoint": self.endpoint, "s3_region": "us-east-1",
            "s3_access_key_id": KEY_ID, "s3_secret_access_key": SECRET,
        }  # fmt: skip

    def speed(self) -> str:
        """Return the server's own figures, as a line: ranges of a large object, one by one and side by side."""
        settings = RemoteSettings(self.endpoint, "us-east-1", KEY_ID, SECRET)
        blobs, key = open_bucket(f"{self.address}/probe", settings), f"probe/{secrets.token_hex(4)}"
        blobs.put(key, os.urandom(PROBE_BYTES))
        offsets = [number * (PROBE_BYTES // READS) for number in range(READS)]
        began = time.perf_counter()
        for offset in offsets[:AT_ONCE]:
            blobs.get_range(key, offset, RANGE_BYTES)
        alone = (time.perf_counter() - began) / AT_ONCE
        with ThreadPoolExecutor(AT_ONCE) as pool:
            began = time.perf_counter()
            list(pool.map(lambda offset: blobs.get_range(key, offset, RANGE_BYTES), offsets))
            small = (time.perf_counter() - began) / READS
            began = time.perf_counter()
            list(pool.map(lambda offset: blobs.get_range(key, offset, MIB), offsets))
            large = READS * MIB / (time.perf_counter() - began)
        blobs.delete(key)
        return (
            f"{self.server} itself: a GET of 64 KiB of a {PROBE_BYTES >> 20} MiB object {alone * 1e3:.1f} ms, "
            f"{small * 1e3:.1f} ms each with {AT_ONCE} at a time; {large / 1e6:.0f} MB/s in ranges of 1 MiB"
        )


def server_here() -> str:
    """Return which server is installed, "" if none is."""
    if shutil.which(FAST):
        return FAST
    return SLOW if importlib.util.find_spec("moto") is not None else ""


@contextlib.contextmanager
def served(scratch: Path) -> Iterator[Bucket]:
    """Serve an empty bucket as long as the block; what is in it lies in `scratch`, or in moto's memory."""
    if server_here() == FAST:
        with _s3s(scratch) as bucket:
            yield bucket
        return
    from recess.testing.blob_server import s3_server

    with s3_server() as server:
        yield Bucket(SLOW, server.make_bucket("bench"), server.endpoint)


@contextlib.contextmanager
def _s3s(scratch: Path) -> Iterator[Bucket]:
    (scratch / "bucket" / "bench").mkdir(parents=True)
    with socket.socket() as probe:  # it cannot be told to choose a port itself
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [FAST, "--host", "127.0.0.1", "--port", str(port), "--access-key", KEY_ID, "--secret-key", SECRET]
    environment = {**os.environ, "RUST_LOG": "off"}
    process = subprocess.Popen(
        [*command, str(scratch / "bucket")], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"{FAST} did not start")
        yield Bucket(FAST, "s3://bench", f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
