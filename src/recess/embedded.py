"""A server inside this very process: no daemon, the same HTTP, so a program needs nothing but `import recess`.

    from recess import Machine
    from recess.embedded import embedded

    with embedded() as client:
        with Machine.run("base", client=client) as machine:
            print(machine.exec("uname -a").stdout)

It runs in a thread with a loop of its own and listens on the home's unix socket like any server: the command line finds
it there. The home's lock still lets one server live; machines go on under their keepers when it ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recess.api.app import serve
from recess.config import Config, load_config
from recess.sdk.client import Client
from recess.sdk.transport import Transport


class _Server:
    """The thread, its loop, and how it went."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="recess-embedded", daemon=True)

    def start(self) -> None:
        """Return when it answers. Raises what its start raised."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def end(self) -> None:
        """End it and wait. Raises what broke it meanwhile."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:  # it is raised again in the thread that opened us
            self._failure = exc
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(self._config, on_ready=self._ready.set, stop=self._stop)


@contextmanager
def embedded(home: str = "", **settings: Any) -> Iterator[Client]:
    """Open a home here and yield a client of it. `settings` are those of `recess.config.Config` (`driver="fake"` for tests).
    Raises HomeLocked when a server owns that home already (then use `Client()`), and all that a server's start raises."""
    if home:
        settings["home"] = home
    config = load_config(**settings)
    server = _Server(config)
    server.start()
    try:
        yield Client(transport=Transport(socket_path=config.socket_path, token=config.token))
    finally:
        server.end()
