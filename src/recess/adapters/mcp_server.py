"""Machines and sessions for any client of the Model Context Protocol: `recess mcp` speaks it over stdin and stdout.

One tool a verb, named noun first. Answers are plain data; output of commands is bounded, and what was cut is said. An
error of Recess reaches the model as the tool's error with its hint. Needs `pip install 'recess[mcp]'`. This module must
know nothing of the house but its SDK.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from recess.errors import RecessError, Timeout
from recess.sdk.client import Client
from recess.sdk.machine import Machine

TEXT_BYTES_MAX = 64 * 1024
FILE_BYTES_MAX = 1 << 20
ENTRIES_MAX = 200
POLL_S = 0.5
INSTRUCTIONS = (
    "Machines are microVMs with files, processes and memory of their own. snapshot_take keeps one whole, machine_fork "
    "copies a running one, snapshot_restore and machine_rewind go back, machine_suspend puts one away until it is used "
    "again. Nothing leaves a machine but what `allow` names. Sessions are durable agents: session_send starts a turn."
)
Json = dict[str, Any]
P = ParamSpec("P")
R = TypeVar("R")


def make_server(client: Client | None = None) -> MCPServer[Any]:
    """Return the MCP server over one Recess server (default: the local one, started on first use)."""
    where = client or Client()
    server: MCPServer[Any] = MCPServer("recess", instructions=INSTRUCTIONS, log_level="ERROR")
    for tool in (*_machine_tools(where), *_life_tools(where), *_session_tools(where)):
        server.tool()(_in_thread(tool))
    return server


def _in_thread(function: Callable[P, R]) -> Callable[P, Any]:
    """A tool off the event loop: calls run side by side, and a ping is answered while a command runs."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except RecessError as exc:
            raise ToolError(f"{exc.message}" + (f" ({exc.hint})" if exc.hint else "")) from exc

    return call


def _cut(data: bytes) -> tuple[str, int]:
    """Return the end of an output as text, and how many bytes before it are left out."""
    return data[-TEXT_BYTES_MAX:].decode(errors="replace"), max(0, len(data) - TEXT_BYTES_MAX)


def _shown(row: Json) -> Json:
    return {name: row[name] for name in ("id", "name", "state", "status")} | {"image": row["spec"]["image"]}


def _machine_tools(client: Client) -> Sequence[Callable[..., Any]]:
    def machine_create(
        image: str = "base", name: str = "", memory: str = "512M", allow: list[str] | None = None,
        ports: list[int] | None = None,
    ) -> Json:  # fmt: skip
        """Start a machine. `allow`: hosts it may reach (host, *.domain, host:port). `ports`: its ports to publish on this
        host's loopback."""
        made = Machine.run(image, name=name, memory=memory, allow=allow or (), ports=ports or (), client=client)
        return _shown(made.info()) | {"ports": {str(port): ":".join(map(str, made.port(port))) for port in ports or ()}}

    def machine_list(everything: bool = False) -> list[Json]:
        """List machines that run; with `everything` also those that are put away or have ended."""
        found = client.call("GET", "/v1/machines", query={"all": "1"} if everything else {})
        return [_shown(row) for row in found["machines"]]

    def machine_exec(machine: str, command: str, cwd: str = "", stdin: str = "", timeout_s: float = 120.0) -> Json:
        """Run a shell command to its end; it is killed after `timeout_s`. Long output is cut at its beginning."""
        done = Machine.get(machine, client=client).exec(command, cwd=cwd, stdin=stdin or None, timeout_s=timeout_s)
        out, out_cut = _cut(done.stdout_bytes)
        err, err_cut = _cut(done.stderr_bytes)
        return {
            "exit_code": done.exit_code,
            "stdout": out,
            "stderr": err,
            "cut_bytes": out_cut + err_cut + done.dropped,
        }

    def machine_spawn(machine: str, command: str, label: str = "") -> Json:
        """Start a process that goes on (a server, a watcher), also over snapshots and forks; its output: machine_output."""
        with Machine.get(machine, client=client).start(command, label=label) as process:
            process.detach()
            return {"job": process.job_id}

    def machine_jobs(machine: str) -> list[Json]:
        """List the machine's processes that were started from outside; exit_code is null while one runs."""
        rows = Machine.get(machine, client=client).jobs()
        # The name that machine_spawn returns and machine_output takes.
        return [{"job": row["job_id"]} | {key: row[key] for key in row if key != "job_id"} for row in rows]

    def machine_output(machine: str, job: str, wait_s: float = 1.0) -> Json:
        """Return a spawned process's kept output and what comes within `wait_s` seconds."""
        gathered: list[bytes] = []
        with Machine.get(machine, client=client).attach(job) as process:
            with contextlib.suppress(Timeout):
                process.wait(min(max(wait_s, 0.1), 60.0), on_stdout=gathered.append, on_stderr=gathered.append)
            code = process.exit_code
            if code is None:
                process.detach()
        text, cut = _cut(b"".join(gathered))
        return {"output": text, "cut_bytes": cut, "exit_code": code}

    def machine_read_file(machine: str, path: str) -> str:
        """Return a text file, at most 1 MiB of it."""
        return Machine.get(machine, client=client).files.read(path)[:FILE_BYTES_MAX].decode(errors="replace")

    def machine_write_file(machine: str, path: str, text: str) -> str:
        """Write a text file whole; folders above it are made."""
        Machine.get(machine, client=client).files.write(path, text)
        return f"{len(text.encode())} bytes written to {path}"

    return (
        machine_create, machine_list, machine_exec, machine_spawn, machine_jobs, machine_output, machine_read_file,
        machine_write_file,
    )  # fmt: skip


def _life_tools(client: Client) -> Sequence[Callable[..., Any]]:
    def machine_suspend(machine: str) -> Json:
        """Put a machine away: memory, processes and files stored, nothing runs."""
        return {"snapshot": Machine.get(machine, client=client).suspend().id}

    def machine_resume(machine: str) -> Json:
        """Bring a machine back; `rung` tells whether memory survived (1 to 3) or only files did (4)."""
        back = Machine.get(machine, client=client).resume()
        return {"rung": back.rung, "why": back.why}

    def machine_remove(machine: str) -> str:
        """End a machine and forget it; its snapshots stay."""
        Machine.get(machine, client=client).remove()
        return f"{machine} is gone"

    def machine_fork(machine: str, count: int = 1) -> list[Json]:
        """Make running copies of a machine, memory and processes included; it goes on itself."""
        return [_shown(child.info()) for child in Machine.get(machine, client=client).fork(count)]

    def machine_rewind(machine: str, snapshot: str = "") -> Json:
        """Take a machine back to one of its snapshots (default: its newest), under its own name."""
        found: Json = client.call("POST", f"/v1/machines/{machine}/rewind", {"to": snapshot})
        return found

    def snapshot_take(machine: str, name: str = "") -> Json:
        """Keep a machine as it is now: memory, processes, files. It goes on."""
        taken = Machine.get(machine, client=client).snapshot(name)
        return {"snapshot": taken.id, "name": name}

    def snapshot_list() -> list[Json]:
        """List snapshots, newest first."""
        rows = client.call("GET", "/v1/snapshots")["snapshots"]
        return [{key: row[key] for key in ("id", "name", "machine", "session", "why", "created")} for row in rows]

    def snapshot_restore(snapshot: str, name: str = "") -> Json:
        """Make a new machine from a snapshot, running on from that instant."""
        made = Machine.restore(snapshot, name=name, client=client)
        return _shown(made.info())

    return (
        machine_suspend, machine_resume, machine_remove, machine_fork, machine_rewind, snapshot_take, snapshot_list,
        snapshot_restore,
    )  # fmt: skip


def _session_tools(client: Client) -> Sequence[Callable[..., Any]]:
    def session_list() -> list[Json]:
        """List the sessions that are open."""
        rows = client.call("GET", "/v1/sessions")["sessions"]
        return [{key: row[key] for key in ("id", "name", "agent", "state", "head")} for row in rows]

    def session_start(agent: str, name: str = "") -> Json:
        """Start a session of a deployed agent."""
        row = client.call("POST", "/v1/sessions", {"agent": agent, "name": name}, key=secrets.token_hex(16))
        return {key: row[key] for key in ("id", "name", "state")}

    def session_send(session: str, text: str, wait_s: float = 120.0) -> Json:
        """Send a message and wait for the end of the turn it begins; `status` is "working" if that takes longer: read on
        with session_log after `position`."""
        body = {"text": text, "mode": "queue"}
        sent = client.call("POST", f"/v1/sessions/{session}/messages", body, key=secrets.token_hex(16))
        position = int(sent["position"])
        ends = time.monotonic() + min(max(wait_s, 0.0), 3600.0)
        entries: list[Json] = []
        while True:
            came = _entries(client, session, int(entries[-1]["position"]) if entries else position)
            entries += came
            status = turn_status(entries, position)
            if status or time.monotonic() >= ends:
                shown = {"entries": entries[-ENTRIES_MAX:], "left_out": max(0, len(entries) - ENTRIES_MAX)}
                return {"position": position, "status": status or "working", **shown}
            if not came:
                time.sleep(POLL_S)

    def session_log(session: str, after: int = 0) -> list[Json]:
        """Return up to 200 entries of a session's log after a position."""
        return _entries(client, session, after)

    def session_fork(session: str, at: int = 0, name: str = "") -> Json:
        """Fork a session, log and machine together; `at`: a log position, 0 for now."""
        body: Json = {"name": name} | ({"at": at} if at else {})
        row = client.call("POST", f"/v1/sessions/{session}/fork", body, key=secrets.token_hex(16))
        return {key: row[key] for key in ("id", "name", "state")}

    def session_rewind(session: str, to: int) -> Json:
        """Take a session back to a log position, machine included; nothing is deleted."""
        row = client.call("POST", f"/v1/sessions/{session}/rewind", {"to": to})
        return {key: row[key] for key in ("id", "name", "state")}

    def session_suspend(session: str) -> Json:
        """Freeze a session now; the next message thaws it."""
        row = client.call("POST", f"/v1/sessions/{session}/suspend", {})
        return {key: row[key] for key in ("id", "name", "state")}

    return (session_list, session_start, session_send, session_log, session_fork, session_rewind, session_suspend)


def _entries(client: Client, session: str, after: int) -> list[Json]:
    page = client.call("GET", f"/v1/sessions/{session}/log", query={"after": after, "limit": ENTRIES_MAX})["entries"]
    return [{key: entry[key] for key in ("position", "kind", "body")} for entry in page]


def turn_status(entries: Sequence[Json], position: int) -> str:
    """Return how the turn ended that a message at `position` began, "" while it has not. Pure."""
    begun = False
    for entry in entries:
        begun = begun or (entry["kind"] == "turn.start" and entry["body"].get("inbox") == position)
        if begun and entry["kind"] == "turn.end":
            return str(entry["body"].get("status", "done"))
    return ""
