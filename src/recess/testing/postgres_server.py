"""A real Postgres for tests: Debian's server in a folder of its own, on a unix socket, durable as in earnest.

    with PostgresServer() as server:
        db = Database.open(server.database(), [SCHEMA])

Run by root, the server runs as the user `postgres`, which Debian's package makes; else as whoever runs the tests. It ends with
the process that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg

from recess.errors import MissingTool, Unavailable

START_S = 60.0
STOP_S = 30.0
_SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "max_wal_size": "256MB",
    "log_min_messages": "warning",
    "fsync": "on",
    "synchronous_commit": "on",
}


def find_binaries() -> Path:
    """Return the folder with the newest server's programs. Raises MissingTool."""
    found = [
        (int(number), path)
        for path in Path("/usr/lib/postgresql").glob("*/bin")
        if (number := path.parent.name).isdigit() and (path / "initdb").exists()
    ]
    if found:
        return max(found)[1]
    on_path = shutil.which("initdb")
    if on_path is None:
        raise MissingTool("there is no Postgres server", hint="as root: apt-get install postgresql")
    return Path(on_path).resolve().parent


class PostgresServer:
    """A server that runs while the context is open; `stop` and `start` in between are a crash and what comes after."""

    def __init__(self) -> None:
        self._bin = find_binaries()
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        self._ready = threading.Event()
        self._said: list[str] = []

    def __enter__(self) -> PostgresServer:
        self._folder = Path(tempfile.mkdtemp(prefix="recess-pg-", dir="/tmp"))  # a socket's path is short
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        command = [str(self._bin / "initdb"), "-D", str(self._data), "-A", "trust", "-U", "postgres"]
        try:
            made = subprocess.run(
                [*self._as_user(), *command, "--no-locale", "-E", "UTF8", "--no-sync"], capture_output=True, text=True
            )
            if made.returncode:
                raise Unavailable(f"initdb failed: {made.stderr.strip()[-500:]}")
            self.start()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        """Start, and return when it takes connections. Raises Unavailable."""
        settings = {**_SETTINGS, "unix_socket_directories": str(self._folder)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self._ready.clear()
        self._said.clear()
        self._process = subprocess.Popen(
            [*self._as_user(), str(self._bin / "postgres"), "-D", str(self._data), *options, "-c", "log_min_messages=log"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        if not self._ready.wait(START_S) or self._process.poll() is not None:
            self.stop()
            raise Unavailable(f"the server did not start: {' '.join(self._said)[-500:]}")

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End it at once, as a crash does (SIGQUIT), or in another of its ways. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def address(self) -> str:
        """The server itself, as its owner."""
        return f"postgresql:///postgres?host={quote(str(self._folder), safe='')}&user=postgres"

    def database(self) -> str:
        """Return the address of an empty database of its own (a schema: quicker to make)."""
        schema = f"t{next(self._numbers)}"
        with psycopg.connect(self.address, autocommit=True) as conn:
            conn.execute(f"CREATE SCHEMA {schema}".encode())
        return f"{self.address}&options=-csearch_path%3D{schema}"

    def cut(self, address: str) -> int:
        """End every connection to one of our databases from the server's side; return how many, when they are gone."""
        (schema,) = re.findall(r"search_path%3D(\w+)", address)
        with psycopg.connect(self.address, autocommit=True) as conn:
            rows = conn.execute(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE application_name = %s",
                (f"recess/{schema}",),
            )
            return len(rows.fetchall())

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self._said = [*self._said[-20:], line.decode(errors="replace").strip()]
                if b"ready to accept connections" in line:
                    self._ready.set()
        self._ready.set()  # it ended

    def _as_user(self) -> list[str]:
        # The server refuses root. The signal: whoever starts it may be killed, and it must not stay behind.
        base = ["setpriv", "--pdeathsig", "QUIT"]
        if os.getuid() == 0:
            base += ["--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        return [*base, "--"]
