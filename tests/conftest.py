"""What all tests share: a home for real machines, a check that nothing is left of them, and no skip unseen.

`images_dir` is what tools/setup.sh provisions (or RECESS_TEST_HOME/images), shared by all runs: content-addressed and
never changed by a test. Everything else of a home (database, blobs, machines, sockets) is fresh for every test.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import secrets
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recess.config import Config, load_config
from recess.images import ImageStore, ensure_boot_files

_ALLOWED = Path(__file__).with_name("allowed_skips.txt")
_GRACE_S = 10.0  # how long what a test ended may take to be gone

_skips: dict[str, str] = {}


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
    config = load_config(home=str(home), run_dir=str(run_dir))
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


# --- skips ------------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in tests/machines boots machines, and whatever asks for a real home does, too."""
    for item in items:
        if "tests/machines/" in item.path.as_posix() or "real_config" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.machines)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember every skip with its reason (an expected failure is no skip)."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips[report.nodeid] = reason.removeprefix("Skipped: ")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that skips itself is a skip, too."""
    if report.skipped:
        _skips[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def unexpected_skips(skips: dict[str, str], allowed: str) -> list[str]:
    """Return the ids of skips that no line of the list of allowed ones matches."""
    patterns = [line.split("  ")[0] for line in allowed.splitlines() if line.strip() and not line.startswith("#")]
    return sorted(i for i in skips if not any(fnmatch.fnmatchcase(i, p) for p in patterns))


def _counts() -> bool:
    return any(os.environ.get(name, "").lower() in ("1", "true") for name in ("CI", "RECESS_CI"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI set, a skip that is not allowed makes the run fail."""
    if _counts() and session.exitstatus == 0 and unexpected_skips(_skips, _ALLOWED.read_text()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name every skip; pytest's own closing line comes after."""
    if not _skips:
        return
    wrong = set(unexpected_skips(_skips, _ALLOWED.read_text()))
    terminalreporter.section("skipped tests")
    for name, reason in sorted(_skips.items()):
        terminalreporter.line(f"{'NOT ALLOWED' if name in wrong else 'allowed'}  {name}: {reason}")
    if wrong and _counts():
        terminalreporter.line(f"{len(wrong)} skips are not in tests/allowed_skips.txt: the run fails", red=True)
