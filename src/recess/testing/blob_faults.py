"""A loopback HTTP proxy that spoils what passes through it, for tests of remote stores: slow, flaky, cut, down, forgetful.

Faults are armed by the test and counted down by requests, so a test says exactly what goes wrong and when. `forgetful`
plays a store whose listings lag behind its writes: keys put meanwhile are left out of them.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

BODY_BYTES_MAX = 64 << 20
_CONTENTS = re.compile(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", re.DOTALL)


class FaultProxy:
    """Forwards to `upstream` ("http://host:port"). All members may be changed at any time."""

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._lock = threading.Lock()
        self._armed: Counter[str] = Counter()
        self._unlisted: set[bytes] = set()
        self._released = threading.Event()
        self.down = False
        self.delay_s = 0.0
        self.forgetful = False
        self.flaky_every = 0  # every so many requests one fails: a refusal and a lost answer in turn
        self.requests: Counter[str] = Counter()
        self.url = ""

    def fail(self, times: int = 1) -> None:
        """Answer the next requests with 503, without passing them on."""
        self._arm("fail", times)

    def cut(self, times: int = 1) -> None:
        """Break off the next bodies of answers in their middle."""
        self._arm("cut", times)

    def lose(self, times: int = 1) -> None:
        """Pass the next requests on, and close the connection instead of answering: nobody knows what happened."""
        self._arm("lose", times)

    def _arm(self, fault: str, times: int) -> None:
        with self._lock:
            self._armed[fault] += times

    def _take(self, fault: str) -> bool:
        with self._lock:
            if self._armed[fault] <= 0:
                return False
            self._armed[fault] -= 1
            return True

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultProxy]:
        """Serve as long as the block."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, name="fault-proxy")
        thread.start()
        try:
            yield self
        finally:
            self._released.set()  # who is being delayed
            server.shutdown()
            server.server_close()
            thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):  # a client that went away
                    super().handle_one_request()

            def log_message(self, format: str, *args: Any) -> None:
                return

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return lambda: proxy.handle(self)
                raise AttributeError(name)

        return Handler

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Pass one request on and spoil it as armed."""
        size = int(request.headers.get("Content-Length") or 0)
        if size > BODY_BYTES_MAX:
            raise ValueError(f"a body of {size} bytes")
        body = request.rfile.read(size)
        with self._lock:
            self.requests[request.command] += 1
            turn, place = divmod(self.requests.total(), self.flaky_every or self.requests.total() + 1)
            if self.flaky_every and not place:
                self._armed["fail" if turn % 2 else "lose"] += 1
        if self.delay_s:
            self._released.wait(self.delay_s)
        if self.down:
            request.close_connection = True
            return
        if self._take("fail"):
            self._answer(request, 503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        status, headers, answer = self._forward(request, body)
        if self.forgetful and request.command == "PUT" and status == 200:
            with self._lock:
                self._unlisted.add(unquote(urlsplit(request.path).path).encode())
        if self._take("lose"):
            request.close_connection = True
            return
        self._answer(request, status, headers, self._listed(request, answer))

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        with contextlib.closing(connection):
            headers = {k: v for k, v in request.headers.items() if k.lower() != "connection"}
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            kept = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
        return response.status, kept, answer

    def _listed(self, request: BaseHTTPRequestHandler, answer: bytes) -> bytes:
        if not self.forgetful or "list-type=2" not in request.path:
            return answer
        bucket = urlsplit(request.path).path.rstrip("/").encode()
        with self._lock:
            hidden = set(self._unlisted)
        return _CONTENTS.sub(lambda m: b"" if bucket + b"/" + m[1] in hidden else m[0], answer)

    def _answer(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response_only(status)
        length = headers.get("Content-Length", "0") if request.command == "HEAD" else str(len(body))
        for name, value in headers.items():
            if name.lower() != "content-length":
                request.send_header(name, value)
        request.send_header("Content-Length", length)
        request.end_headers()
        if request.command == "HEAD":
            return
        if body and self._take("cut"):
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            return
        request.wfile.write(body)
