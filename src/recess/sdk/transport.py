"""HTTP over the local server's unix socket (or a URL), JSON in and out, typed errors back.

Standard library only: importing this must stay cheap, since `recess ps` has 200 ms in all.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from recess.errors import RecessError, ServerUnavailable, all_errors

_BY_CODE = {cls.code: cls for cls in all_errors()}
Json = dict[str, Any]
OnProgress = Callable[[str], None]


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over AF_UNIX."""

    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if self.timeout is not None:
            self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.sock.close()
            raise


def error_from(data: Mapping[str, Any]) -> RecessError:
    """Return the typed error that a problem body names; unknown codes become the root class."""
    cls = _BY_CODE.get(str(data.get("code")), RecessError)
    details = data.get("details")
    error = cls(str(data.get("message", "unknown error")), hint=str(data.get("hint", "")))
    error.details = dict(details) if isinstance(details, Mapping) else {}
    return error


class Transport:
    """One server, reached by `socket_path` or `url` ("http://host:port"). One connection a call: no state, thread-safe."""

    def __init__(self, *, socket_path: Path | None = None, url: str = "", token: str = "") -> None:
        self.socket_path = socket_path
        self.url = url
        self._token = token

    def connection(self, timeout_s: float | None = None) -> http.client.HTTPConnection:
        """Return an unopened connection."""
        if self.url:
            parts = urlsplit(self.url)
            cls = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            return cls(parts.hostname or "localhost", parts.port, timeout=timeout_s)
        if self.socket_path is None:
            raise ServerUnavailable("no server is named: neither a socket nor a URL", hint="set RECESS_URL")
        return _UnixConnection(self.socket_path, timeout_s)

    def silent(self, error: object) -> ServerUnavailable:
        """Return the error of a server that does not answer, with what can be done about it."""
        if self.url:
            hint = "is RECESS_URL right, and does a server listen there (recess up --listen HOST:PORT)?"
            return ServerUnavailable(f"no answer from the server at {self.url}: {error}", hint=hint)
        return ServerUnavailable(f"no answer from the server at {self.socket_path}: {error}", hint="run: recess up")

    def headers(self) -> dict[str, str]:
        """Return the headers every call carries."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _send(
        self, method: str, path: str, query: Mapping[str, Any] | None, body: bytes | None, headers: Mapping[str, str],
        timeout_s: float | None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:  # fmt: skip
        conn = self.connection(timeout_s)
        target = quote(path, safe="/:@")
        if query:
            target += "?" + urlencode({k: v for k, v in query.items() if v is not None})
        try:
            conn.request(method, target, body=body, headers={**self.headers(), **headers})
            return conn, conn.getresponse()
        except (OSError, http.client.HTTPException) as exc:
            conn.close()
            raise self.silent(exc) from exc
        except BaseException:
            conn.close()
            raise

    def raw(
        self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: bytes | None = None,
        headers: Mapping[str, str] | None = None, timeout_s: float | None = None,
    ) -> bytes:  # fmt: skip
        """Return the body's bytes; raises the typed error of a problem answer."""
        conn, response = self._send(method, path, query, body, headers or {}, timeout_s)
        try:
            with _whole_answer():
                data = response.read()
        finally:
            conn.close()
        if response.status >= 400:
            raise problem_of(response.status, data)
        return data

    def call(
        self, method: str, path: str, body: object = None, *, query: Mapping[str, Any] | None = None, key: str = "",
        timeout_s: float | None = None,
    ) -> Json:  # fmt: skip
        """Send JSON, return JSON ({} for an empty answer). `key` is the Idempotency-Key."""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Idempotency-Key"] = key
        payload = None if body is None else json.dumps(body).encode()
        data = self.raw(method, path, query=query, body=payload, headers=headers, timeout_s=timeout_s)
        return object_of(data)

    def call_with_progress(
        self, method: str, path: str, body: object, on_progress: OnProgress, *, key: str = "",
        query: Mapping[str, Any] | None = None,
    ) -> Json:  # fmt: skip
        """Like `call`, for calls that may take long: the server streams lines of progress before the result."""
        headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
        if key:
            headers["Idempotency-Key"] = key
        payload = None if body is None else json.dumps(body).encode()
        conn, response = self._send(method, path, query, payload, headers, None)
        try:
            for line in _lines(response):
                item = object_of(line)
                if "progress" in item:
                    on_progress(str(item["progress"]))
                elif "error" in item:
                    raise error_from(item["error"])
                elif "result" in item:
                    return dict(item["result"])
        finally:
            conn.close()
        raise ServerUnavailable("the server ended before it answered", hint="see server.log in the home")

    def events(self, path: str, *, after: str = "", timeout_s: float | None = None) -> Iterator[tuple[str, str, Json]]:
        """Yield (event, id, data) of a server-sent event stream until the server ends it or goes away: an event `end`
        tells the first, without one the caller asks again with the last id. Raises the typed error of a problem answer."""
        headers = {"Accept": "text/event-stream"}
        if after:
            headers["Last-Event-ID"] = after
        conn, response = self._send("GET", path, None, None, headers, timeout_s)
        try:
            event, ident, data = "message", "", ""
            for raw in _lines_until_cut(response):
                line = raw.decode().rstrip("\r\n")
                if not line:
                    if data:
                        yield event, ident, object_of(data.encode())
                    event, data = "message", ""
                    continue
                name, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if name == "event":
                    event = value
                elif name == "id":
                    ident = value
                elif name == "data":
                    data += value
        finally:
            conn.close()


@contextmanager
def _whole_answer() -> Iterator[None]:
    """A server that dies in the middle of an answer is unavailable, not a defect of the caller."""
    try:
        yield
    except (OSError, http.client.HTTPException) as exc:
        raise ServerUnavailable(
            f"the server broke off in the middle of its answer: {exc!r}", hint="see server.log in the home"
        ) from exc


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield an answer's lines as they come. Raises the typed error of a problem answer, ServerUnavailable."""
    with _whole_answer():
        if response.status >= 400:
            raise problem_of(response.status, response.read())
        while line := response.readline():
            yield line


def _lines_until_cut(response: http.client.HTTPResponse) -> Iterator[bytes]:
    lines = _lines(response)
    if response.status >= 400:
        yield from lines  # raises
    with suppress(ServerUnavailable):
        yield from (line for line in lines if line.endswith(b"\n"))  # the last may be half of one


def object_of(data: bytes) -> Json:
    """Return an answer's JSON object ({} for an empty one). Raises ServerUnavailable."""
    if not data.strip():
        return {}
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise ServerUnavailable("the server's answer is not JSON") from exc
    return value if isinstance(value, dict) else {"value": value}


def problem_of(status: int, data: bytes) -> RecessError:
    """Return the typed error of a problem answer."""
    try:
        body = json.loads(data)
    except ValueError:
        body = {}
    if isinstance(body, dict) and "code" in body:
        return error_from(body)
    return RecessError(f"the server answered {status}: {data[:200].decode(errors='replace')}")
