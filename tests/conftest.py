"""What all tests share: a home for real machines, a check that nothing is left of them, and no skip unseen.

`images_dir` is what tools/setup.sh provisions (or RECESS_TEST_HOME/images), shared by all runs: content-addressed and
never changed by a test. Everything else of a home (database, blobs, machines, sockets) is fresh for every test.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from recess.config import Config, load_config
from recess.crashpoints import Crashed
from recess.drivers.kept.cgroup import Groups
from recess.images import ImageStore, ensure_boot_files
from recess.testing.firecracker_rig import why_no_firecracker
from recess.testing.guestlink_process import writable_cgroup
from recess.testing.gvisor_rig import has_runsc
from recess.testing.postgres_server import PostgresServer
from recess.testing.small_disk import has_namespaces, may_mount, own_namespace

_ALLOWED = Path(__file__).with_name("allowed_skips.txt")
_SKIPS_NOT_ALLOWED = 20  # exit code; pytest's own are below 6
_MACHINES_TIMEOUT_S = 300  # tests run side by side, and guests in software: what takes 20 s alone may take 100
_GRACE_S = 10.0  # how long what a test ended may take to be gone

_skips: dict[str, str] = {}


# No example of a property has a time to keep: a machine that stands still for a moment says nothing about it.
hypothesis.settings.register_profile("recess", deadline=None)
hypothesis.settings.load_profile("recess")


# --- simulated crashes --------------------------------------------------------------------------------------------------


def _no_crash_of_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], Crashed))


# A task that a simulated crash ended is told of whenever it is collected, maybe in the middle of a parse; formatting
# its traceback parses too, which Python 3.11 answers with a SystemError in whatever test runs then.
logging.getLogger("asyncio").addFilter(_no_crash_of_ours)


# --- real machines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def images_dir() -> Path:
    """A folder with kernel, initial root for the present guestd, and the image `base`; built here if it must be."""
    home = os.environ.get("RECESS_TEST_HOME")
    config = load_config(**({"home": home} if home else {}))
    ensure_boot_files(config.images_dir, config.bin_dir / "guestd")
    ImageStore(config.images_dir).ensure_base()
    return config.images_dir


@pytest.fixture
def real_config(tmp_path: Path, images_dir: Path) -> Iterator[Config]:
    """The configuration of an empty home that holds the shared images.

    Afterwards no process may be left that names this home or its run folder, and no VM's folder in the latter; what
    is left is ended and removed, and the test fails.
    """
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images_dir)
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    run_dir = base / f"recess-t-{secrets.token_hex(4)}"
    # Pinned, so that what is tested does not depend on what else is installed here.
    config = load_config(home=str(home), run_dir=str(run_dir), driver=os.environ.get("RECESS_DRIVER") or "qemu")
    try:
        yield config
    finally:
        processes = left_processes(run_dir, home)
        folders = sorted(p.name for p in (run_dir / "m").glob("*")) if run_dir.is_dir() else []
        _end(processes)
        shutil.rmtree(run_dir, ignore_errors=True)
    assert not processes, f"processes left behind: {list(processes.values())}"
    assert not folders, f"folders of VMs left behind in {run_dir / 'm'}: {folders}"


def left_processes(*places: Path) -> dict[int, str]:
    """Return pid -> command line of other processes that name one of these places, after those ending have ended."""
    until = time.monotonic() + _GRACE_S
    while found := _naming(*places):
        waiting: dict[int, int] = {}
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                waiting[os.pidfd_open(pid)] = pid
        poller = select.poll()
        for fd in waiting:
            poller.register(fd, select.POLLIN)
        ended = poller.poll(max(0, int((until - time.monotonic()) * 1000))) if waiting else [()]
        for fd in waiting:
            os.close(fd)
        if not ended:
            return found
    return {}


def _naming(*places: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    needles = [os.fsencode(p) for p in places]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            folder = os.fsencode(os.readlink(entry / "cwd"))
            if any(n in command or folder == n or folder.startswith(n + b"/") for n in needles):
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    return found


def _end(processes: dict[int, str]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- a real Postgres ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server of our own, started when the first test asks for it; each test takes a database of its own in it."""
    with PostgresServer() as server:
        yield server


# --- collection -------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in tests/machines boots machines, and whatever asks for a real home does, too. A test that mounts
    is run in a child with namespaces of its own where this process may not mount."""
    for index, item in enumerate(items):
        if "tests/machines/" in item.path.as_posix() or "real_config" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.machines)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_MACHINES_TIMEOUT_S))
        if item.get_closest_marker("mounts") and not may_mount():
            items[index] = _in_own_namespace(item)


def _in_own_namespace(item: pytest.Item) -> pytest.Item:
    """Return a stand-in for a test: it runs the test by a pytest of its own, and holds if that passes, unskipped."""
    if not has_namespaces():
        item.add_marker(pytest.mark.skip(reason="this user may neither mount nor make namespaces"))
        return item
    assert item.parent is not None
    stand_in = pytest.Function.from_parent(item.parent, name=item.name, callobj=_runner(item.nodeid, item.config))
    stand_in.own_markers = [mark for mark in item.own_markers if mark.name != "asyncio"]
    stand_in.add_marker(pytest.mark.timeout(300))  # the child's own limit comes first, and ends what it started
    return stand_in


def _runner(nodeid: str, config: pytest.Config) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 't'}"]
        done = subprocess.run(
            own_namespace([*pytest_, nodeid]), cwd=config.rootpath, env={**os.environ, "CI": "true"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    return run


# --- skips ------------------------------------------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember every skip with its reason (an expected failure is no skip)."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips[report.nodeid] = reason.removeprefix("Skipped: ")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that skips itself is a skip, too."""
    if report.skipped:
        _skips[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


# When a line of the list holds; each is looked up only if a line with it is needed.
_CONDITIONS: dict[str, Callable[[], bool]] = {
    "always": lambda: True,
    "ordinary-user": lambda: os.geteuid() != 0,
    "no-runsc": lambda: not has_runsc(),
    "no-firecracker": lambda: bool(why_no_firecracker()),
    "no-firecracker-binary": lambda: not load_config().firecracker_bin,
    "no-cgroup": lambda: writable_cgroup() is None,
    "no-groups": lambda: Groups.find().top is None,
    "no-namespaces": lambda: not may_mount() and not has_namespaces(),
}


def unexpected_skips(skips: dict[str, str], allowed: str) -> list[str]:
    """Return the ids of skips that no line of the list of allowed ones matches whose condition holds here.

    Raises ValueError for a line that is not PATTERN, CONDITION, why (two spaces between them).
    """
    rows = [line.split("  ", 2) for line in allowed.splitlines() if line.strip() and not line.startswith("#")]
    wrong = [row for row in rows if len(row) != 3 or row[1] not in _CONDITIONS]
    if wrong:
        raise ValueError(f"{_ALLOWED.name}: not a pattern, a condition ({', '.join(_CONDITIONS)}) and why: {wrong[0]}")
    return sorted(i for i in skips if not any(fnmatch.fnmatchcase(i, p) and _CONDITIONS[c]() for p, c, _ in rows))


def _counts() -> bool:
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in ("CI", "RECESS_CI"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI set, a skip that is not allowed makes the run fail, whatever a second try of what failed may give."""
    if _counts() and session.exitstatus in (0, 1) and unexpected_skips(_skips, _ALLOWED.read_text()):
        session.exitstatus = _SKIPS_NOT_ALLOWED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every skip; pytest's own closing line comes after."""
    if not _skips:
        return
    wrong = set(unexpected_skips(_skips, _ALLOWED.read_text()))
    terminalreporter.section("skipped tests")
    for name, reason in sorted(_skips.items()):
        terminalreporter.line(f"{'NOT ALLOWED' if name in wrong else 'allowed'}  {name}: {reason}")
    if wrong and _counts():
        terminalreporter.line(f"{len(wrong)} skips are not allowed here by {_ALLOWED.name}: the run fails", red=True)
