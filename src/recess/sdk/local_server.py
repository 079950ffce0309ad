"""The local server as its clients see it: is it there, start it on first use, wait until it answers.

Two clients racing start one server: the home's lock lets only one live, the other's process ends and both clients
find the winner's socket.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from recess.config import Config
from recess.errors import HomeLocked, RecessError, ServerUnavailable
from recess.sdk.transport import Transport, error_from

START_TIMEOUT_S = 30.0


def transport_for(config: Config) -> Transport:
    """Return the transport that the configuration names: a URL, else the local socket."""
    if config.url:
        return Transport(url=config.url, token=config.token)
    return Transport(socket_path=config.socket_path, token=config.token)


def is_up(transport: Transport, timeout_s: float = 5.0) -> bool:
    """Tell whether a server answers."""
    try:
        transport.call("GET", "/v1/info", timeout_s=timeout_s)
    except (ServerUnavailable, TimeoutError):
        return False
    return True


def _tail(path: Path, limit: int = 2000) -> str:
    try:
        return path.read_bytes()[-limit:].decode(errors="replace")
    except OSError:
        return ""


def _last_error(log_path: Path) -> RecessError:
    """Return why a server ended: the typed error it wrote last, else a pointer to its log."""
    lines = _tail(log_path).strip().splitlines()
    with suppress(ValueError):
        data = json.loads(lines[-1]) if lines else None
        if isinstance(data, dict) and "code" in data:
            return error_from(data)
    last = f": {lines[-1][:200]}" if lines else ""
    return ServerUnavailable(f"the local server ended while starting{last}", hint=f"see {log_path}")


def start_server(config: Config) -> Transport:
    """Start a detached server process and wait until it answers. Raises ServerUnavailable with the log's tail."""
    config.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_path = config.home / "server.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "recess.cli.main", "up", "--detached", "--home", str(config.home)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    transport = Transport(socket_path=config.socket_path, token=config.token)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if config.socket_path.exists() and is_up(transport):
            return transport
        if process.poll() is not None and not is_up(transport):
            # It may have lost the race for the home: give the winner a moment to open its socket.
            error = _last_error(log_path)
            if not isinstance(error, HomeLocked):
                raise error
        time.sleep(0.02)
    raise ServerUnavailable(f"the local server did not answer within {START_TIMEOUT_S:.0f} s", hint=f"see {log_path}")


def ensure_server(config: Config) -> Transport:
    """Return a transport to a server that answers, starting the local one if there is none."""
    transport = transport_for(config)
    if config.url:
        return transport
    if config.socket_path.exists():
        try:
            transport.call("GET", "/v1/info", timeout_s=10.0)
        except ServerUnavailable:
            pass
        except RecessError:
            return transport
        else:
            return transport
    return start_server(config)
