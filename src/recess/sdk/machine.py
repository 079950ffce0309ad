"""`Machine`: a microVM as a tool's computer, for agents that live outside: run, exec, files, snapshot, fork, restore.

    from recess import Machine

    with Machine.run("base") as machine:
        machine.files.write("/root/a.py", "print(6 * 7)")
        print(machine.exec("python3 /root/a.py").check().stdout)
        left, right = machine.fork(2)

Blocking; `AsyncMachine` is the same for asyncio. It knows the HTTP schema and nothing else of the house.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from recess.errors import IllegalState, NotFound, Timeout
from recess.sdk.client import Client, default_client
from recess.sdk.machine_files import Files
from recess.sdk.processes import OnBytes, Process, Result, argv_of
from recess.sdk.transport import Json

Ports = Mapping[int, int] | Sequence[int]


@dataclass(frozen=True)
class Resumed:
    """How a machine came back: `rung` 1 warm, 2 local snapshot, 3 remote snapshot, 4 disk only, 5 fresh, and why this one."""

    rung: int
    why: str
    seconds: float
    snapshot: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A stored snapshot: `id`, the `name` it was given, and its figures (standstill, bytes, times)."""

    id: str
    name: str
    machine: str
    figures: Mapping[str, Any] = field(default_factory=dict)


class Machine:
    """One machine, by its id. Handles are cheap and hold nothing: two on one machine do not disturb each other. As a
    context manager it removes the machine at the end."""

    def __init__(self, ident: str, *, client: Client | None = None) -> None:
        self.id = ident
        self.client = client or default_client()
        self.resumed: Resumed | None = None  # how it came to be, if it was restored

    # -- making and finding ------------------------------------------------------------------------------------------

    @classmethod
    def run(
        cls, image: str = "base", *, name: str = "", memory: int | str | None = None, cpus: int | None = None,
        disk: int | str | None = None, argv: Sequence[str] = (), env: Mapping[str, str] | None = None, user: str = "",
        cwd: str = "", network: str | None = None, allow: Sequence[str] = (),
        routes: Mapping[str, str] | None = None, ports: Ports = (), labels: Mapping[str, str] | None = None,
        volumes: Mapping[str, str] | None = None, idle_s: float = 0.0, key: str = "", client: Client | None = None,
    ) -> Machine:  # fmt: skip
        """Start a machine and return it when it answers.

        `memory` and `disk` are bytes or "512M". `argv` is its main process, if it has one; `user`, `cwd` and `env` are the
        image's own where you say nothing. `network`: broker (what `allow` and `routes` let out), none or full. `ports`:
        guest ports to publish on 127.0.0.1, {guest: host} or a list (any free host port); `port()` tells them. `volumes`:
        {folder of the host, or a volume's name: "/path" or "/path:ro"}, copied both ways (see `sync_volumes`).
        `idle_s`: unused for so long it is suspended, and wakes when it is used (0: never). `key`: the
        same key again is the same machine. Raises NotFound (image), NameInUse, InvalidSpec, Unavailable.
        """
        spec: Json = {
            "image": image, "memory_bytes": memory, "cpus": cpus, "disk_bytes": disk, "argv": list(argv),
            "env": dict(env or {}), "user": user or None, "cwd": cwd or None, "network": network, "allow": list(allow),
            "routes": dict(routes or {}), "ports": _ports(ports), "labels": dict(labels or {}),
            "volumes": _volumes(volumes or {}), "idle_s": idle_s,
        }  # fmt: skip
        where = client or default_client()
        made = where.call("POST", "/v1/machines", {"name": name, "spec": spec}, key=key or secrets.token_hex(16))
        return cls(str(made["id"]), client=where)

    @classmethod
    def get(cls, ref: str, *, client: Client | None = None) -> Machine:
        """Return the machine with this id, name or unambiguous id prefix. Raises NotFound."""
        where = client or default_client()
        return cls(str(where.call("GET", f"/v1/machines/{ref}")["id"]), client=where)

    @classmethod
    def list(cls, *, everything: bool = False, client: Client | None = None) -> list[Machine]:
        """Return the machines that run, newest first; with `everything` those that do not, too."""
        where = client or default_client()
        query = {"all": "1"} if everything else {}
        return [cls(str(one["id"]), client=where) for one in where.call("GET", "/v1/machines", query=query)["machines"]]

    @classmethod
    def restore(cls, snapshot: str, *, name: str = "", disk: bool = False, client: Client | None = None) -> Machine:
        """Make a new machine from a snapshot (id or name): memory, processes and files; with `disk` its files alone,
        booted cold. `resumed` of what you get tells the rung. Raises NotFound, Incompatible."""
        where = client or default_client()
        body = {"name": name, "disk": disk}
        path = f"/v1/snapshots/{snapshot}/restore"
        made = where.call("POST", path, body, key=secrets.token_hex(16))
        machine = cls(str(made["machine"]["id"]), client=where)
        machine.resumed = _resumed(made["resume"])
        return machine

    @classmethod
    def of_token(cls, token: str, *, client: Client | None = None) -> Machine:
        """Return the machine that runs with this token (its /run/recess/token): who calls, when a machine calls. Raises
        Refused for a token of an earlier life of it, of the machine it was copied from, or of nobody."""
        where = client or default_client()
        return cls(str(where.call("POST", "/v1/machine-tokens", {"token": token})["machine"]), client=where)

    # -- what it is --------------------------------------------------------------------------------------------------

    def info(self) -> Json:
        """Return the machine as the API tells it: name, state, spec, status and, while it runs, stats."""
        return self._call("GET")

    @property
    def state(self) -> str:
        """Its state now: creating | running | paused | suspended | exited | dead | stalled | damaged."""
        return str(self.info()["state"])

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.info()["name"])

    def port(self, guest: int) -> tuple[str, int]:
        """Return (host ip, host port) at which a published port of the guest is reached. Raises NotFound."""
        found = self.info()
        for ip, host, inside in found["meta"].get("ports") or found["spec"]["ports"]:
            if inside == guest:
                return str(ip), int(host)
        raise NotFound(f"machine {self.id} does not publish port {guest}", hint="run it with ports=[...]")

    # -- work in it --------------------------------------------------------------------------------------------------

    @property
    def files(self) -> Files:
        """Its files."""
        return Files(self.client.transport, self.id)

    def start(
        self, command: str | Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "",
        user: str = "", tty: bool = False, stdin: bool = False, label: str = "",
    ) -> Process:  # fmt: skip
        """Start a process and return it, attached. A text is run by the machine's `sh`, a list as it is."""
        first = {
            "argv": argv_of(command), "env": dict(env or {}), "cwd": cwd or None, "user": user or None, "tty": tty, "stdin": stdin,
            "label": label,
        }  # fmt: skip
        return Process(self.client.transport, self.id, first)

    def attach(self, job_id: str) -> Process:
        """Return a process that was started before, by its job id: also after a thaw, a fork or a server restart. Output
        that was not read comes from the guest's ring (its newest part). Raises NotFound."""
        return Process(self.client.transport, self.id, {"attach": job_id})

    def exec(
        self, command: str | Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "",
        user: str = "", stdin: bytes | str | None = None, timeout_s: float | None = None,
        on_stdout: OnBytes | None = None, on_stderr: OnBytes | None = None,
    ) -> Result:  # fmt: skip
        """Run a process to its end and return how it ended; `.check()` on that raises CommandFailed. One that has not ended
        after `timeout_s` is killed, and Timeout is raised."""
        with self.start(command, env=env, cwd=cwd, user=user, stdin=stdin is not None) as process:
            if stdin is not None:
                process.write(stdin)
                process.close_stdin()
            try:
                return process.wait(timeout_s, on_stdout=on_stdout, on_stderr=on_stderr)
            except Timeout:
                with contextlib.suppress(IllegalState, NotFound):
                    process.kill()
                raise

    def jobs(self) -> Sequence[Json]:
        """Return the guest's job table: {job_id, pid, argv, label, started_s, exit_code} each."""
        return tuple(self._call("GET", "/jobs")["jobs"])

    def logs(
        self, *, tail: int | None = None, since_s: float | None = None, until_s: float | None = None,
        timestamps: bool = False,
    ) -> bytes:  # fmt: skip
        """Return what is kept of the main process's output: all of it, its last `tail` lines, the lines that came between two
        wall times (seconds since 1970), each with its time before it."""
        query = {"tail": tail, "since": since_s, "until": until_s, "timestamps": "1" if timestamps else None}
        return self.client.transport.raw("GET", f"/v1/machines/{self.id}/logs", query=query)

    def sync_volumes(self) -> Sequence[Json]:
        """Exchange its volumes with the host now, and return what was done for each: copied_in, copied_out, removed_in,
        removed_out, bytes, conflicts, left_out, error."""
        return tuple(self._call("POST", "/sync", {})["volumes"])

    # -- its life ----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop its vCPUs; memory stays (rung 1)."""
        self._call("POST", "/pause", {})

    def unpause(self) -> None:
        """Let it go on."""
        self._call("POST", "/unpause", {})

    def suspend(self) -> Snapshot:
        """Freeze it whole, store it, give its memory back; `resume` brings it back under its identity."""
        return _snapshot(self._call("POST", "/suspend", {}))

    def resume(self, *, disk: bool = False) -> Resumed:
        """Bring it back by the best rung that works, and tell which; with `disk` cold, from its newest disk."""
        self.resumed = _resumed(self._call("POST", "/resume", {"disk": disk}))
        return self.resumed

    def snapshot(self, name: str = "", *, ttl_s: float | None = None) -> Snapshot:
        """Take a snapshot; the machine goes on. A name in use moves to it."""
        return _snapshot(self._call("POST", "/snapshot", {"name": name, "ttl_s": ttl_s}))

    def fork(self, count: int = 1, *, names: Sequence[str] = ()) -> Sequence[Machine]:
        """Make `count` (at most 64) running copies, memory and processes and all; this one goes on."""
        body = {"count": count, "names": [str(one) for one in names]}
        made = self._call("POST", "/fork", body, key=secrets.token_hex(16))
        return [Machine(str(one["id"]), client=self.client) for one in made["machines"]]

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """SIGTERM its main process, wait, end the machine; its disk stays."""
        self._call("POST", "/stop", {"timeout_s": timeout_s})

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        self._call("POST", "/kill", {})

    def remove(self) -> None:
        """End it and forget it; its snapshots stay. One that is gone is no error."""
        with contextlib.suppress(NotFound):
            self._call("DELETE", query={"force": "1"})

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Machine({self.id!r})"

    def _call(self, method: str, path: str = "", body: object = None, **more: Any) -> Json:
        return self.client.call(method, f"/v1/machines/{self.id}{path}", body, **more)


def _volumes(volumes: Mapping[str, str]) -> list[Json]:
    return [
        {"source": source, "target": target.removesuffix(":ro"), "readonly": target.endswith(":ro")}
        for source, target in volumes.items()
    ]


def _ports(ports: Ports) -> list[list[object]]:
    pairs = ports.items() if isinstance(ports, Mapping) else ((guest, 0) for guest in ports)
    return [["127.0.0.1", host, guest] for guest, host in pairs]


def _resumed(data: Mapping[str, Any]) -> Resumed:
    figures = {"bytes_read": data.get("bytes_read", 0), "timings_s": data.get("timings_s") or {}}
    return Resumed(int(data["rung"]), str(data["why"]), float(data["seconds"]), str(data.get("snapshot", "")), figures)


def _snapshot(data: Mapping[str, Any]) -> Snapshot:
    return Snapshot(str(data["id"]), str(data.get("name", "")), str(data.get("machine", "")), data.get("figures") or {})
