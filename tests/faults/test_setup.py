"""The set-up on hosts that lack something: each step says what is missing and what to do. Forced, not imitated:
what is missing is truly hidden (a PATH without it, an empty file mounted over it, a tiny disk, a port nobody serves)."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from recess.testing.small_disk import own_namespace

ROOT = Path(__file__).parents[2]
NEEDED = (
    "bash basename cat cmp cut df dirname dpkg-query env find flock grep head id install mkdir mktemp mv nproc rm sed "
    "sha256sum tail tr uname unshare mount sh "
)
NOWHERE = "http://127.0.0.1:9"  # the discard port: refused at once
SHIM = "#!/bin/sh\n{}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone's files, as far as the set-up looks at them."""
    clone = tmp_path / "clone"
    for name in ("tools", "guest"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("target"), symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", clone)
    return clone


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A PATH with what every Debian has, and nothing else."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in NEEDED.split():
        found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
        assert found, name
        (path / name).symlink_to(found)
    return path


def shim(commands: Path, name: str, script: str) -> None:
    (commands / name).write_text(SHIM.format(script))
    (commands / name).chmod(0o755)


def setup(folder: Path, commands: Path, before: str = "", **env: str) -> tuple[int, str]:
    """Run the set-up as root of namespaces of its own, after `before`."""
    done = subprocess.run(
        own_namespace(["bash", "-c", f"{before}\nexec bash tools/setup.sh gate"]), cwd=folder, env={"PATH": str(commands), "HOME": str(commands), "LC_ALL": "C", **env},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "unbound variable" not in done.stderr
    assert "command not found" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def has_cargo(commands: Path) -> None:
    shim(commands, "cargo", "echo cargo 1.99.0")


def no_package(folder: Path) -> dict[str, str]:
    """Return an environment in which no Debian package is installed."""
    (folder / "dpkg" / "info").mkdir(parents=True)
    (folder / "dpkg" / "status").touch()
    return {"DPKG_ADMINDIR": str(folder / "dpkg")}


def test_another_kind_of_machine(folder: Path, commands: Path) -> None:
    (commands / "uname").unlink()
    shim(commands, "uname", '[ "$1" = -m ] && echo aarch64 || echo Linux')
    code, said = setup(folder, commands)
    assert code == 1
    assert "this is Linux on aarch64; Recess runs on Linux on x86_64" in said


def test_no_room(folder: Path, commands: Path) -> None:
    (commands / "cp").symlink_to("/bin/cp")
    code, said = setup(folder, commands, "mkdir s && mount -t tmpfs -o size=20m tmpfs s && cp -r tools s && cd s")
    assert code == 1
    assert re.search(r"clone/s has \d+ MB free; the set-up needs 2500 MB there", said)
    assert "hint: free some space" in said


def test_not_debian(folder: Path, commands: Path) -> None:
    code, said = setup(folder, commands)
    assert code == 1
    assert "there is no apt-get" in said
    assert "hint: use Debian 12 or newer" in said


@pytest.mark.parametrize("sudo", ["", "echo 'sudo: a password is required' >&2; exit 1"], ids=["no sudo", "refused"])
def test_a_package_is_missing_and_the_user_may_not_install_it(
    folder: Path, commands: Path, tmp_path: Path, sudo: str
) -> None:
    (commands / "apt-get").symlink_to("/usr/bin/apt-get")
    if sudo:
        shim(commands, "sudo", sudo)
    code, said = setup(folder, commands, "exec unshare --user -- bash tools/setup.sh gate", **no_package(tmp_path))
    assert code == 1
    missing = re.search(r"installing them needs root: (.*)\n", said)
    assert missing is not None, said
    assert {"gcc", "git", "python3-venv"} <= set(missing[1].split())
    assert f"as root: apt-get update && apt-get install --no-install-recommends {missing[1]}; then run" in said


def test_the_package_mirror_cannot_be_reached(folder: Path, commands: Path, tmp_path: Path) -> None:
    (commands / "apt-get").symlink_to("/usr/bin/apt-get")
    lists = tmp_path / "apt"
    (lists / "lists" / "partial").mkdir(parents=True)
    (lists / "sources.list").write_text(f"deb {NOWHERE}/debian bookworm main\n")
    (lists / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{lists}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
        f'Dir::State::Lists "{lists}/lists";\nDir::State::Status "{tmp_path}/dpkg/status";\nDir::Cache "{lists}";\n'
        'APT::Sandbox::User "root";\nDebug::NoLocking "true";\nAcquire::http::Proxy "false";\n'
    )
    code, said = setup(folder, commands, APT_CONFIG=str(lists / "apt.conf"), **no_package(tmp_path))
    assert code == 1
    assert "apt could not get these packages:" in said
    assert "Could not connect to 127.0.0.1:9" in said
    assert "hint: is the mirror reachable? see /etc/apt/sources.list*" in said


def test_python_is_too_old(folder: Path, commands: Path) -> None:
    (commands / "apt-get").symlink_to("/usr/bin/apt-get")
    has_cargo(commands)
    shim(commands, "python3", '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    hide = f"if [ -e /usr/bin/python3 ]; then mount --bind {commands}/python3 /usr/bin/python3; fi"
    code, said = setup(folder, commands, hide)
    assert code == 1
    assert "there is no Python 3.11 or newer with its venv module (python3 here: Python 3.9.2)" in said
    assert "hint: as root: apt-get install python3 python3-venv" in said


def test_the_package_index_cannot_be_reached(folder: Path, commands: Path) -> None:
    (commands / "apt-get").symlink_to("/usr/bin/apt-get")
    has_cargo(commands)
    code, said = setup(folder, commands, PIP_INDEX_URL=NOWHERE, PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    assert code == 1
    assert "pip could not install the Python packages" in said
    assert "hint: is the package index reachable?" in said
    assert not (folder / ".venv" / "setup.stamp").exists()


def test_the_crates_cannot_be_reached(folder: Path, tmp_path: Path) -> None:
    ready(folder, folder)
    (tmp_path / "cargo").mkdir()
    (tmp_path / "cargo" / "config.toml").write_text(
        f'[source.crates-io]\nreplace-with = "none"\n[source.none]\nregistry = "sparse+{NOWHERE}/"\n[net]\nretry = 0\n'
    )
    done = subprocess.run(
        ["bash", "tools/setup.sh", "gate"], cwd=folder, env={**os.environ, "CARGO_HOME": str(tmp_path / "cargo")},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "guestd or keeper could not be built" in done.stderr
    assert "127.0.0.1" in done.stderr
    assert "hint: is crates.io reachable?" in done.stderr
    assert not (folder / "src" / "recess" / "_bin").exists()


def ready(folder: Path, made_for: Path) -> None:
    """Make a virtual environment that counts as complete, for the folder it was made for."""
    digest = hashlib.sha256((folder / "pyproject.toml").read_bytes()).hexdigest()
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("recess", "python"):
        (folder / ".venv" / "bin" / name).symlink_to("/bin/true")
    (folder / ".venv" / "setup.stamp").write_text(f"{digest} {made_for}\n")


def test_an_environment_of_another_folder_is_not_used(folder: Path, commands: Path) -> None:
    """A clone that was copied together with its environment would run the other clone's code."""
    (commands / "apt-get").symlink_to("/usr/bin/apt-get")
    has_cargo(commands)
    ready(folder, folder.parent / "elsewhere")
    hide = f"if [ -e /usr/bin/python3 ]; then mount --bind {commands}/false /usr/bin/python3; fi"
    shim(commands, "false", "exit 1")
    code, said = setup(folder, commands, hide)
    assert code == 1
    assert "there is no Python 3.11" in said  # it went to make a new one
    assert not (folder / ".venv").exists()


def test_the_second_set_up_waits_for_the_first(folder: Path, commands: Path) -> None:
    held = subprocess.Popen(
        ["flock", "tools/setup.sh", "sh", "-c", "echo held; read end"],
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert held.stdin is not None
    assert held.stdout is not None
    with held:
        assert held.stdout.readline() == b"held\n"
        waiting = subprocess.Popen(
            ["bash", "tools/setup.sh", "gate"], cwd=folder, env={"PATH": str(commands), "HOME": str(commands)},
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with waiting:
            assert waiting.stderr is not None
            assert waiting.stderr.readline() == "waiting: another set-up is at work in this folder\n"
            held.stdin.close()
            assert "there is no apt-get" in waiting.stderr.read()
