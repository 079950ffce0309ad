"""`Client`: one server, as Python programs see it. Machines hang off it; every call is one HTTP request.

Without arguments it is the local server, started on first use, exactly as for the command line. `recess.embedded`
gives one whose server runs in this very process.
"""

from __future__ import annotations

from typing import Any, Protocol

from recess.config import load_config
from recess.sdk.local_server import ensure_server
from recess.sdk.transport import Json, Transport


class Client:
    """Thread-safe: it holds no connection. `url` and `token` default to RECESS_URL and RECESS_TOKEN, `home` to
    RECESS_HOME; a `transport` of your own is used as it is. Raises ServerUnavailable when the first call is made."""

    def __init__(self, url: str = "", token: str = "", *, home: str = "", transport: Transport | None = None) -> None:
        given = {"url": url, "token": token, "home": home}
        self._settings: dict[str, Any] = {name: value for name, value in given.items() if value}
        self._transport = transport

    @property
    def transport(self) -> Transport:
        """The way to the server; the local one is started now if it does not run."""
        if self._transport is None:
            self._transport = ensure_server(load_config(**self._settings))
        return self._transport

    def call(self, method: str, path: str, body: object = None, **more: Any) -> Json:
        """Make one call of the API (docs/internals/http-api.md) and return its JSON. Raises the server's typed error."""
        return self.transport.call(method, path, body, **more)

    def info(self) -> Json:
        """Return what the server is: version, driver and why that one, what it can do."""
        return self.call("GET", "/v1/info")


class Served(Protocol):
    """What has a client: a machine, for the helpers below it."""

    @property
    def client(self) -> Client:
        """The client."""
        ...


_default: Client | None = None


def default_client() -> Client:
    """Return the client that `Machine` and the adapters use when none is named."""
    global _default
    if _default is None:
        _default = Client()
    return _default


def use(client: Client | None) -> None:
    """Let `client` be what `default_client` returns from now on (None: the local server again)."""
    global _default
    _default = client
