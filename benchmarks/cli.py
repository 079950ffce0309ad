"""`make bench-cli`: what a user of the command line waits for, beside the same under podman, runsc and QEMU by hand.

    python -m benchmarks.cli [--json FILE] [--markdown FILE] [--repeats N]

A server of its own on a home of its own, with the images of the configured one. A peer that this host does not have is
named, not left out. CPU is that of the whole host while it ran, so that servers and VMs count too: run it on a quiet machine.
"Bare" throughput is the guest protocol over the same virtio port, driven by hand: what HTTP, the SDK and the forwarder add is
the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks import serial
from benchmarks.bare import Bare, BareVm
from benchmarks.figures import Figure, table
from benchmarks.run import bare_files, machine_facts, make_home, say
from recess.config import Config, load_config
from recess.drivers.gvisor.runsc import find_runsc
from recess.errors import MissingTool, RecessError
from recess.guestlink.link import ExecRequest
from recess.sdk.client import Client
from recess.sdk.files import download, upload
from recess.sdk.machine import Machine

PAYLOAD_BYTES = 64 << 20
AT_ONCE = 50
PORT = 8000
PORT_S = 60.0
ASK_EVERY_S = 0.02
# A server that sends PAYLOAD_BYTES to whoever connects, in the guest.
SENDER = f"""
import socket
s = socket.create_server(("127.0.0.1", {PORT}))
while True:
    c = s.accept()[0]
    for _ in range({PAYLOAD_BYTES} >> 20):
        c.sendall(bytes(1 << 20))
    c.close()
"""


class Rig:
    """The command line over a home of its own."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.env = {**os.environ, "RECESS_HOME": str(config.home), "RECESS_DRIVER": "qemu", "NO_COLOR": "1"}
        self.client = Client(home=str(config.home))

    def recess(self, *words: str) -> None:
        """Run the command line; raises CalledProcessError."""
        command = [str(Path(sys.executable).with_name("recess")), *words]
        subprocess.run(command, env=self.env, check=True, capture_output=True)

    def machine(self, name: str) -> Machine:
        """Return a machine by its name."""
        return Machine.get(name, client=self.client)


def host_cpu_s() -> float:
    """Return how many seconds all CPUs of this host have worked so far."""
    user, nice, system, _idle, _wait, irq, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def repeat(count: int, act: Callable[[], object]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Do it; return wall and host CPU milliseconds of each."""
    wall, cpu = [], []
    for _ in range(count):
        began, worked = time.perf_counter(), host_cpu_s()
        act()
        wall.append((time.perf_counter() - began) * 1e3)
        cpu.append((host_cpu_s() - worked) * 1e3)
    return tuple(wall), tuple(cpu)


# --- run --rm base true -------------------------------------------------------------------------------------------------


def one_shot(rig: Rig, bare: Bare, loop: asyncio.AbstractEventLoop, repeats: int) -> list[Figure]:
    """`recess run --rm base true`, with a server and without, beside a bare fork that runs `true`."""

    async def by_hand() -> None:
        vm, _ = await bare.fork()
        await (await vm.link.exec(ExecRequest(argv=["true"]))).wait()
        await vm.kill()

    warm, cpu = repeat(repeats, lambda: rig.recess("run", "--rm", "base", "true"))
    by_qemu, cpu_qemu = repeat(repeats, lambda: loop.run_until_complete(by_hand()))

    def cold() -> None:
        rig.recess("run", "--rm", "base", "true")

    cold_wall = []
    for _ in range(max(3, repeats // 4)):
        rig.recess("down")
        cold_wall += repeat(1, cold)[0]
    return [
        Figure("run --rm base true, server up", "ms", warm, by_qemu, note="bare: a fork by QEMU alone, true, kill"),
        Figure("run --rm base true, CPU of the host", "ms", cpu, cpu_qemu),
        Figure("run --rm base true, server started for it", "ms", tuple(cold_wall)),
    ]


def peers(scratch: Path, repeats: int) -> tuple[list[Figure], list[str]]:
    """The same by container runtimes: no VM of its own, or no VM at all. Returns also what is not here."""
    figures, missing = [], []
    for name, command in (("podman run --rm, crun", podman(scratch)), ("runsc do", runsc())):
        if isinstance(command, str):
            missing.append(f"{name}: {command}")
            continue
        try:
            wall, cpu = repeat(repeats, lambda: subprocess.run(command, check=True, capture_output=True))  # noqa: B023
        except subprocess.CalledProcessError as exc:
            missing.append(f"{name}: it fails here: {exc.stderr.decode(errors='replace').strip()[-200:]}")
            continue
        figures += [Figure(f"{name} true", "ms", wall), Figure(f"{name} true, CPU of the host", "ms", cpu)]
    wall, _ = repeat(repeats, lambda: subprocess.run(["true"], check=True))
    return [*figures, Figure("true, a process of the host", "ms", wall)], missing


def podman(scratch: Path) -> list[str] | str:
    """Return podman's command over a root of busybox alone, or why there is none."""
    program, busybox = shutil.which("podman"), shutil.which("busybox")
    if program is None or shutil.which("crun") is None or busybox is None:
        return "not installed (as root: tools/bench_cli_peers.sh, or apt-get install podman crun busybox-static)"
    if os.geteuid():
        return "run the benchmark as root: it gives podman a mount namespace without the host's control groups"
    root = scratch / "busybox"
    (root / "bin").mkdir(parents=True)
    shutil.copy(busybox, root / "bin" / "true")
    # No storage of its own is unpacked, no network made, no control group: the least that a container costs. The mount
    # namespace is for hosts with both kinds of control groups, which crun refuses even where it is told to use none.
    own = ["--root", str(scratch / "podman"), "--runroot", str(scratch / "podman-run"), "--storage-driver", "vfs"]
    own += ["--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", "crun"]
    options = ["--rm", "--network", "none", "--cgroups", "disabled"]
    options += [word for limit in ("nofile", "nproc") for word in ("--ulimit", f"{limit}=1024:1024")]
    script = '{ umount -R /sys/fs/cgroup 2>/dev/null || true; } && mount -t tmpfs none /sys/fs/cgroup && exec "$0" "$@"'
    return [
        *("unshare", "--mount", "sh", "-c", script), program, *own, "run", *options, "--rootfs", str(root), "/bin/true"
    ]  # fmt: skip


def runsc() -> list[str] | str:
    """Return gVisor's command over the host's own files, or why there is none."""
    try:
        return [str(find_runsc(load_config())), "--network=none", "--ignore-cgroups", "do", "true"]
    except MissingTool as exc:
        return f"{exc.message} ({exc.hint})"


# --- the command line and exec ------------------------------------------------------------------------------------------


def start_up(rig: Rig, repeats: int) -> list[Figure]:
    """How long the command line takes to say something."""
    nothing, _ = repeat(repeats, lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    return [
        Figure("recess --help", "ms", repeat(repeats, lambda: rig.recess("--help"))[0], nothing, 120, note="bare: python -c pass"),
        Figure("recess ps", "ms", repeat(repeats, lambda: rig.recess("ps"))[0], nothing, 200),
    ]  # fmt: skip


def execs(rig: Rig, vm: BareVm, loop: asyncio.AbstractEventLoop, repeats: int) -> list[Figure]:
    """One process in a machine that runs: by the command line, by the SDK, by hand; and fifty at once."""
    machine = rig.machine("bench")

    async def by_hand() -> None:
        await (await vm.link.exec(ExecRequest(argv=["true"]))).wait()

    bare, _ = repeat(repeats, lambda: loop.run_until_complete(by_hand()))
    sdk, _ = repeat(repeats, lambda: machine.exec(["true"]).check())
    cli, _ = repeat(repeats, lambda: rig.recess("exec", "bench", "true"))

    def one(_: int) -> float:
        return repeat(1, lambda: machine.exec(["true"]).check())[0][0]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.perf_counter()
        each = tuple(pool.map(one, range(AT_ONCE)))
        whole = (time.perf_counter() - began) * 1e3
    every = f"for i in $(seq {AT_ONCE}); do /bin/true & done; wait"

    async def within() -> None:
        await (await vm.link.exec(ExecRequest(argv=["sh", "-c", every]))).wait()

    floor, _ = repeat(3, lambda: loop.run_until_complete(within()))
    return [
        Figure("exec round trip, SDK", "ms", sdk, bare, note="bare: the guest protocol by hand"),
        Figure("exec round trip, command line", "ms", cli, bare),
        Figure(f"{AT_ONCE} exec at once, each", "ms", each, bare),
        Figure(
            f"{AT_ONCE} exec at once, all",
            "ms",
            (whole,),
            floor,
            note=f"bare: {AT_ONCE} `true` by one shell in the guest",
        ),
    ]


# --- ports and files ----------------------------------------------------------------------------------------------------


def answers(address: tuple[str, int]) -> None:
    """Ask until a web server answers. Raises TimeoutError."""
    until = time.monotonic() + PORT_S
    while time.monotonic() < until:
        connection = http.client.HTTPConnection(*address, timeout=5)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        connection.close()
        time.sleep(ASK_EVERY_S)  # a connection that is refused in the guest costs it what its program would have used
    raise TimeoutError(f"{address} does not answer")


def until_answer(rig: Rig, repeats: int) -> list[Figure]:
    """From the call until a published port answers from outside: a new machine's server, and a restored one's."""
    web = ["python3", "-m", "http.server", str(PORT)]
    fresh, restored = [], []
    for number in range(repeats):
        began = time.perf_counter()
        with Machine.run(argv=web, ports=[PORT], client=rig.client) as machine:
            answers(machine.port(PORT))
            fresh.append((time.perf_counter() - began) * 1e3)
            if number == 0:
                machine.snapshot("bench-web")
    for _ in range(repeats):
        began = time.perf_counter()
        with Machine.restore("bench-web", client=rig.client) as machine:
            answers(machine.port(PORT))
            restored.append((time.perf_counter() - began) * 1e3)
    return [
        Figure("run until its port answers (Python's web server starts)", "ms", tuple(fresh)),
        Figure("restore until its port answers", "ms", tuple(restored)),
    ]


def archive() -> bytes:
    """Return a tar of one file that cannot be compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("payload")
        info.size = PAYLOAD_BYTES
        tar.addfile(info, io.BytesIO(os.urandom(PAYLOAD_BYTES)))
    return out.getvalue()


def rate(act: Callable[[], object]) -> float:
    """Return MB/s of something that moves PAYLOAD_BYTES."""
    began = time.perf_counter()
    act()
    return PAYLOAD_BYTES / (time.perf_counter() - began) / 1e6


def throughput(rig: Rig, vm: BareVm, loop: asyncio.AbstractEventLoop, repeats: int) -> list[Figure]:
    """Files in and out, and a published port, beside the guest protocol by hand and a virtio-serial port with nothing on it."""
    machine, data, count = rig.machine("bench"), archive(), max(3, repeats // 4)
    place = f"/v1/machines/{machine.id}/archive"

    def into() -> None:
        query = {"path": "/root"}
        upload(rig.client.transport, place, io.BytesIO(data), size=len(data), query=query, on_bytes=lambda _n: None)

    def out() -> None:
        query = {"path": "/root/payload"}
        with Path(os.devnull).open("wb") as sink:
            download(rig.client.transport, place, sink, query=query, on_bytes=lambda _n: None)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 256 << 10):
            yield data[at : at + (256 << 10)]

    async def dialled() -> None:
        stream = await vm.link.dial(PORT)
        while await stream.read(1 << 20):
            pass
        await stream.close()

    loop.run_until_complete(vm.link.exec(ExecRequest(argv=["python3", "-c", SENDER])))
    rig.recess("exec", "-d", "bench", "python3", "-c", SENDER)
    address = machine.port(PORT)

    def bare(way: Callable[[BareVm, int], Coroutine[None, None, float]]) -> tuple[float, ...]:
        return tuple(loop.run_until_complete(way(vm, PAYLOAD_BYTES)) for _ in range(count))

    inward, outward = bare(serial.into), bare(serial.out)
    rows: list[tuple[str, Callable[[], object], tuple[float, ...]]] = [
        ("cp into a machine", into, inward),
        ("the same by hand, in the guest protocol", lambda: loop.run_until_complete(vm.link.put_tar("/root", pieces())), inward),
        ("cp out of a machine", out, outward),
        ("a published port, out of the machine", lambda: drain(address), outward),
        ("the same by hand, in the guest protocol", lambda: loop.run_until_complete(drained(dialled)), outward),
    ]  # fmt: skip
    return [
        Figure(name, "MB/s", tuple(rate(act) for _ in range(count)), beside, more_is_better=True)
        for name, act, beside in rows
    ]


async def drained(dialled: Callable[[], object]) -> None:
    """Await what dials, again while nobody listens yet."""
    for _ in range(100):
        try:
            await dialled()  # type: ignore[misc]
            return
        except RecessError:
            await asyncio.sleep(0.1)


def drain(address: tuple[str, int]) -> None:
    """Read all that a port sends, again while nobody listens yet."""
    until, total = time.monotonic() + PORT_S, 0
    while total < PAYLOAD_BYTES and time.monotonic() < until:
        with socket.create_connection(address) as connection:
            while piece := connection.recv(1 << 20):
                total += len(piece)


# --- all of it ----------------------------------------------------------------------------------------------------------


@contextmanager
def rigged(scratch: Path) -> Iterator[Rig]:
    """A server on a home of its own, ended with everything on it."""
    rig = Rig(make_home(scratch / "home", load_config().images_dir))
    try:
        rig.recess("run", "-d", "--name", "bench", "-p", str(PORT), "base")
        yield rig
    finally:
        with suppress(subprocess.CalledProcessError):
            rig.recess("down", "--all")
        shutil.rmtree(rig.config.run_dir, ignore_errors=True)


def measure(repeats: int) -> tuple[list[Figure], list[str]]:
    """Measure everything; return also the peers that are not here."""
    scratch = Path(tempfile.mkdtemp(prefix="recess-bench-cli-"))
    loop = asyncio.new_event_loop()
    try:
        with rigged(scratch) as rig:
            bare = Bare(bare_files(rig.config, rig.config.images_dir, scratch))
            try:
                loop.run_until_complete(bare.make_template())
                say("one-shot runs")
                figures = one_shot(rig, bare, loop, repeats)
                others, missing = peers(scratch, repeats)
                say("the command line, exec")
                figures += [*others, *start_up(rig, repeats)]
                rig.recess("start", "bench")
                vm, _ = loop.run_until_complete(bare.fork())
                try:
                    figures += execs(rig, vm, loop, repeats)
                    say("ports and files")
                    figures += [*until_answer(rig, repeats), *throughput(rig, vm, loop, repeats)]
                finally:
                    loop.run_until_complete(vm.kill())
            finally:
                bare.close()
    finally:
        loop.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return figures, missing


def markdown(figures: list[Figure], missing: list[str]) -> str:
    """Return the figures as a Markdown table, with the peers that are missing below it. Pure."""
    lines = ["| figure | n | p50 | p95 | unit | bare p50 | ratio | budget |", "|---|---|---|---|---|---|---|---|"]
    for f in figures:
        bare = f"{sorted(f.bare)[len(f.bare) // 2]:.4g}" if f.bare else "-"
        ratio = f"{f.ratio:.2f}" if f.ratio is not None else "-"
        budget = "-" if f.budget is None else f"{f.budget:g}, {'met' if f.met else 'NOT met'}"
        lines.append(
            f"| {f.name} | {len(f.samples)} | {f.p50:.4g} | {f.p95:.4g} | {f.unit} | {bare} | {ratio} | {budget} |"
        )
    return "\n".join([*lines, "", *(f"- not measured: {one}" for one in missing)]).rstrip() + "\n"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default="build/bench-cli.json", help="where to write the figures")
    parser.add_argument("--markdown", default="build/bench-cli.md", help="where to write the table")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    figures, missing = measure(args.repeats)
    facts = machine_facts()
    for path in (Path(args.json), Path(args.markdown)):
        path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"machine": facts, "figures": [f.to_json() for f in figures], "missing": missing}
    Path(args.json).write_text(json.dumps(whole, indent=1))
    Path(args.markdown).write_text(markdown(figures, missing))
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    print(table(figures))
    for one in [*(f"{f.name}: {f.note}" for f in figures if f.note), *(f"not measured: {m}" for m in missing)]:
        print(one)


if __name__ == "__main__":
    main()
