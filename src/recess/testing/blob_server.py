"""A real S3 server on loopback for tests: `moto`, in a process of its own, gone with the test that started it.

Why moto: docs/decisions/s3-test-server.md. Its content lives in its memory; nothing is left on the disk.
"""

from __future__ import annotations

import contextlib
import http.client
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from recess.blobs.s3 import RemoteSettings

_PROGRAM = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test closes it, or dies
server.stop()
"""
_END_S = 10.0


@dataclass(frozen=True)
class S3Server:
    """A running server. `settings` reach it with credentials that it accepts (it accepts any)."""

    endpoint: str
    settings: RemoteSettings

    def through(self, endpoint: str) -> RemoteSettings:
        """Return settings that reach it by another way (a proxy)."""
        return replace(self.settings, endpoint=endpoint)

    def make_bucket(self, name: str) -> str:
        """Create an empty bucket; return its address."""
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=_END_S)
        with contextlib.closing(connection):
            connection.request("PUT", f"/{name}")
            status = connection.getresponse().status
        if status != 200:
            raise RuntimeError(f"the S3 server answered {status} to the making of bucket {name}")
        return f"s3://{name}"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server as long as the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the S3 server did not start: is moto[s3] with flask installed? (the dev extra)")
        endpoint = f"http://127.0.0.1:{int(line)}"
        settings = RemoteSettings(endpoint, "us-east-1", "test-key-id", "test-secret", timeout_s=20.0)
        yield S3Server(endpoint, settings)
    finally:
        process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
