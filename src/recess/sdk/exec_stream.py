"""One process in a machine over the exec WebSocket: stdin, stdout, stderr, terminal size, signals, exit code.

Message shapes: docs/internals/http-api.md. Blocking; the reader runs in the caller's thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from recess.errors import RecessError, ServerUnavailable, Timeout
from recess.sdk.transport import Transport, error_from

OnOutput = Callable[[int, bytes], None]


class ExecStream:
    """An attached process. `start` is the first message (argv and its settings, or {"attach": job})."""

    def __init__(self, transport: Transport, ref: str, start: Mapping[str, Any]) -> None:
        # Imported here: the CLI's fast verbs never attach.
        from websockets.exceptions import ConnectionClosed, InvalidHandshake
        from websockets.sync.client import connect, unix_connect

        path = f"/v1/machines/{quote(ref, safe=':@')}/exec"
        headers = transport.headers()
        try:
            if transport.url:
                parts = urlsplit(transport.url)
                scheme = "wss" if parts.scheme == "https" else "ws"
                opened = connect(f"{scheme}://{parts.netloc}{path}", additional_headers=headers, max_size=2**22)
            else:
                opened = unix_connect(
                    str(transport.socket_path), f"ws://localhost{path}", additional_headers=headers, max_size=2**22
                )
            self._ws = opened.__enter__()  # newer versions want that said; `close` is all that leaving it does
        except (OSError, InvalidHandshake) as exc:
            raise transport.silent(exc) from exc
        try:
            self._ws.send(json.dumps(dict(start)))
            first = self._text(self._ws.recv())
        except ConnectionClosed as exc:
            raise ServerUnavailable(f"the server went away while attaching: {exc}", hint="run: recess up") from exc
        except BaseException:
            self._ws.close()  # else its reader's thread stays
            raise
        self.job_id = str(first.get("job_id", ""))
        self.pid = int(first.get("pid", 0))

    @staticmethod
    def _text(message: str | bytes) -> dict[str, Any]:
        if isinstance(message, bytes):
            raise RecessError("protocol: binary where text was expected")
        data = json.loads(message)
        if "error" in data:
            raise error_from(data["error"])
        return dict(data)

    def run(self, on_output: OnOutput) -> int:
        """Deliver output until the process ends; return its exit code. Raises the server's typed error."""
        for item in self.items():
            if isinstance(item, int):
                return item
            on_output(*item)
        raise ServerUnavailable("the stream ended without an exit code")

    def items(self, timeout_s: float | None = None) -> Iterator[tuple[int, bytes] | int]:
        """Yield (stream, bytes) as they come and, last, the exit code; the connection is closed then. Raises the server's
        typed error, ServerUnavailable, and Timeout when `timeout_s` are over: that leaves it open for another call."""
        from websockets.exceptions import ConnectionClosed

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        over = False
        try:
            while True:
                over = True
                message = self._ws.recv(None if deadline is None else max(0.0, deadline - time.monotonic()))
                if isinstance(message, bytes):
                    over = False  # who stops reading here may read on later
                    yield message[0], message[1:]
                    continue
                data = self._text(message)
                if "exit_code" in data:
                    self.close()
                    yield int(data["exit_code"])
                    return
        except TimeoutError as exc:
            over = False
            raise Timeout(f"job {self.job_id} had not ended after {timeout_s:g} s") from exc
        except ConnectionClosed as exc:
            raise ServerUnavailable("the server went away; the process in the machine goes on") from exc
        finally:
            if over:
                self.close()

    def write(self, data: bytes) -> None:
        """Send to stdin (from any thread); a closed stream is ignored: the process has ended."""
        self._send(data)

    def eof(self) -> None:
        """Close stdin."""
        self._send(json.dumps({"op": "eof"}))

    def resize(self, rows: int, cols: int) -> None:
        """Tell the pty its size."""
        self._send(json.dumps({"op": "resize", "rows": rows, "cols": cols}))

    def signal(self, number: int) -> None:
        """Send a signal to the process group."""
        self._send(json.dumps({"op": "signal", "number": number}))

    def _send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):
            self._ws.send(message)

    def close(self) -> None:
        """Detach; the process goes on."""
        self._ws.close()
