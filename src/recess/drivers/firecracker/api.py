"""Firecracker's API over its unix socket: one request, one answer, a connection each (HTTP/1.1, JSON bodies).

Source: firecracker.yaml, the API's own description. What is asked is built in `calls.py`; this module knows HTTP and how a
refusal is worded, and must know nothing of machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from recess.drivers.firecracker.calls import Call
from recess.drivers.kept.layout import socket_address
from recess.errors import DriverFailed, Timeout

API_SOCKET = "api.sock"

_ANSWER_MAX = 64 * 1024
_CALL_S = 60.0
_READY_STEP_S = 0.005


class Refused(DriverFailed):
    """Firecracker answered that it will not: the VM is as it was before (but a refused load ends the process)."""


class Api:
    """The API of the VMM whose run folder this is. Stateless: it may be used from the moment the socket answers."""

    def __init__(self, run: Path) -> None:
        self._run = run

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the API answers. Raises Timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(OSError):
                        _, writer = await self._connect()
                        writer.close()
                        return
                    await asyncio.sleep(_READY_STEP_S)  # Firecracker makes the socket itself; its coming is no event
        except TimeoutError as exc:
            raise Timeout(f"Firecracker's API was not there within {timeout_s:g} s") from exc

    async def state(self) -> str:
        """Return "Not started", "Running" or "Paused". Raises as `call` does."""
        answer = await self._request("GET", "/", None, _CALL_S)
        return str(answer.get("state", "")) if isinstance(answer, dict) else ""

    async def call(self, call: Call, *, timeout_s: float = _CALL_S) -> None:
        """Have it done. Raises Refused with Firecracker's words, Timeout, DriverFailed when the process is gone."""
        await self._request(call.method, call.path, call.body, timeout_s)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        with socket_address(self._run, API_SOCKET) as address:
            return await asyncio.open_unix_connection(address, limit=_ANSWER_MAX)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        what = f"{method} {path}"
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._connect()
                try:
                    writer.write(f"{head}\r\n".encode() + content)
                    await writer.drain()
                    status, answer = await _read_answer(reader)
                finally:
                    writer.close()
        except TimeoutError as exc:
            raise Timeout(f"Firecracker did not answer {what} within {timeout_s:g} s") from exc
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as exc:
            raise DriverFailed(f"Firecracker gave no answer to {what}: {exc}", log="") from exc
        if status >= 300:
            fault = answer.get("fault_message") if isinstance(answer, dict) else None
            raise Refused(f"Firecracker refused {what}: {fault or f'status {status}'}", log="")
        return answer


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Return (status, decoded body). Raises ValueError for what is no answer of bounded size."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, rest = head[0].partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError("not an HTTP answer")
    status, length = int(rest[:3]), 0
    for line in head[1:]:
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-length":
            length = int(value)
    if not 0 <= length <= _ANSWER_MAX:
        raise ValueError(f"an answer of {length} bytes")
    body = await reader.readexactly(length)
    return status, json.loads(body) if body.strip() else None
