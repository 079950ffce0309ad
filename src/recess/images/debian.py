"""Makes a root image from a list of Debian packages: mmdebstrap to a tar archive, cleaned, written as EROFS.

Works as root and as an ordinary user (mmdebstrap's unshare mode, else fakechroot if that is installed). The host's
own mirrors and proxy are used, its hostname and resolver are not taken over. This module must know nothing of image
names or of who uses the image.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from recess.errors import BadInput, MissingTool, OutOfSpace, RecessError, Unavailable
from recess.images import erofs, tree
from recess.images.tools import Progress, run_tool
from recess.units import format_bytes

SUITE = "bookworm"
# What the smallest root takes while it is made (minbase and its archive lists: 323 MB measured, 2026-11-24). With less
# there is nothing to begin: besides, `apt-get update` (2.6.1) was seen to wait forever when the disk fills under it.
SCRATCH_LEAST_BYTES = 300_000_000
BASE_PACKAGES = (
    "ca-certificates",
    "curl",
    "git",
    "procps",
    "python3",
    "python3-pip",
    "python3-setuptools",
    "python3-venv",
    "python3-wheel",
)
_MAX_PACKAGES = 500
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,127}")
_DEFAULT_SOURCES = (
    f"deb http://deb.debian.org/debian {SUITE} main",
    f"deb http://deb.debian.org/debian {SUITE}-updates main",
    f"deb http://deb.debian.org/debian-security {SUITE}-security main",
)
# What no machine reads: documentation (not licences), translations, what apt and dpkg can make again, logs, and the
# builder's own traces.
_DROP = (
    "usr/share/doc/*",
    "usr/share/man/*",
    "usr/share/info/*",
    "usr/share/locale/*",
    "usr/share/lintian/*",
    "usr/share/bug/*",
    "var/lib/apt/lists/*",
    "var/cache/apt/*",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/*",
    "var/cache/man/*",
    "var/lib/dpkg/*-old",
    "var/log/*",
    "dev/*",
    "run/*",
    "tmp/*",
    "etc/*-",
    "etc/.pwd.lock",
    "etc/apt/apt.conf.d/99mmdebstrap",
)
_KEEP = ("usr/share/doc/*/copyright", "var/lib/apt/lists", "usr/share/locale/locale.alias")
_PASSWORD_CHANGED = re.compile(rb"^([^:\n]*:[^:\n]*):[0-9]*:", re.MULTILINE)


def check_packages(packages: Iterable[str]) -> tuple[str, ...]:
    """Return the package names sorted, without doubles. Raises BadInput for anything that is not a name."""
    names = sorted(set(packages))
    for name in names:
        if not _PACKAGE.fullmatch(name):
            raise BadInput(f"not a Debian package name: {name!r}")
    if len(names) > _MAX_PACKAGES:
        raise BadInput(f"more than {_MAX_PACKAGES} packages")
    return tuple(names)


def build_root(
    packages: Sequence[str], work: Path, progress: Progress, *, cancel: threading.Event | None = None
) -> Path:
    """Build the root image of these packages and return its path below `work` (an empty folder of the caller's).

    Needs the network. Raises MissingTool, Unavailable (mirror, unknown package, no user namespaces), OutOfSpace,
    Corrupt; KeyboardInterrupt when cancelled. The caller removes `work`, whatever happened.
    """
    started_s = int(time.time())
    archive = work / "root.tar"
    _bootstrap(packages, archive, progress, cancel)
    progress("writing the root image")
    nodes = clean(tree.read_tar(archive), archive, started_s)
    target = work / "root.erofs"
    erofs.write_image(nodes, archive, target)
    archive.unlink()
    return target


def clean(nodes: dict[str, tree.Node], archive: Path, build_started_s: int) -> dict[str, tree.Node]:
    """Return the tree as it goes into the image: pruned, neutral in name and time."""
    nodes = tree.prune(tree.settle_times(nodes, build_started_s), _DROP, _KEEP)
    newest = max((n.mtime_s for n in nodes.values()), default=0)
    tree.put_file(nodes, "etc/hostname", b"recess\n", mtime_s=newest)
    tree.put_file(nodes, "etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n", mtime_s=newest)
    tree.put_file(nodes, "etc/resolv.conf", b"", mtime_s=newest)
    tree.put_file(nodes, "etc/machine-id", b"", mode=0o444, mtime_s=newest)
    shadow = nodes.get("etc/shadow")
    if shadow is not None and shadow.data is None:  # holds the day of the build
        with archive.open("rb") as handle:
            handle.seek(shadow.offset)
            content = _PASSWORD_CHANGED.sub(rb"\1:19000:", handle.read(shadow.size))
        nodes["etc/shadow"] = tree.with_content(shadow, content)
    return nodes


def _bootstrap(packages: Sequence[str], archive: Path, progress: Progress, cancel: threading.Event | None) -> None:
    # An unprivileged build runs under other user ids, which must be able to pass through its parent folders.
    scratch = Path(tempfile.mkdtemp(prefix="recess-image-"))
    scratch.chmod(0o711)
    try:
        _build_in(scratch, packages, archive, progress, cancel)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build_in(
    scratch: Path, packages: Sequence[str], archive: Path, progress: Progress, cancel: threading.Event | None
) -> None:
    if shutil.disk_usage(scratch).free < SCRATCH_LEAST_BYTES:
        raise _no_space(scratch, archive)
    options = [f"--aptopt={line}" for line in _proxy_options()]
    include = [f"--include={','.join(packages)}"] if packages else []
    command = ["env", f"TMPDIR={scratch}", "mmdebstrap", "--variant=minbase", "--format=tar", *options, *include]
    if os.geteuid() == 0 and _can_unshare_mounts():
        command = ["unshare", "--mount", "--propagation", "private", *command]  # no mount can outlive the build
    try:
        run_tool([*command, SUITE, str(archive), *_host_sources()], progress=_phases(progress), cancel=cancel)
    except Unavailable as exc:
        raise explain(exc) from exc
    except OutOfSpace as exc:
        raise _no_space(scratch, archive, exc.details.get("log", "")) from exc


def _no_space(scratch: Path, archive: Path, log: object = "") -> OutOfSpace:
    return OutOfSpace(
        f"no space left for making the image: {format_bytes(shutil.disk_usage(scratch).free)} free in {scratch.parent},"
        f" {archive.parent} takes the result",
        hint=f"the smallest image takes {format_bytes(SCRATCH_LEAST_BYTES)} while it is made, packages more: free some there,"
        " or set TMPDIR to a larger disk",
        log=log,
    )


def explain(error: Unavailable) -> RecessError:
    """Return the error with what a person can do about it, from what mmdebstrap printed."""
    log = str(error.details.get("log", ""))
    missing = re.search(r"Unable to locate package (\S+)|Package '?([^' ]+)'? has no installation candidate", log)
    if missing:
        name = missing[1] or missing[2]
        return BadInput(f"Debian {SUITE} has no package {name!r}", hint="look it up on packages.debian.org", log=log)
    if re.search(r"unable to pick chroot mode|newuidmap|newgidmap|unable to unshare|unshare\(\) failed", log):
        return MissingTool(
            "this user may not build images: no user namespaces",
            hint="as root: apt-get install uidmap && usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "
            "USER; or install fakechroot and fakeroot",
            log=log,
        )
    if re.search(r"Could not (resolve|connect)|Temporary failure|Failed to fetch|Connection (failed|timed out)", log):
        return Unavailable(
            "the package mirror cannot be reached", hint="check the network, proxy and apt's sources", log=log
        )
    return error


def _phases(progress: Progress) -> Progress:
    """Pass on mmdebstrap's own one-line phases, not apt's chatter."""

    def line(text: str) -> None:
        if text.startswith("I: ") and not text.startswith("I: using "):
            progress(text[3:].rstrip("."))

    return line


def _can_unshare_mounts() -> bool:
    try:
        run_tool(["unshare", "--mount", "--propagation", "private", "true"])
    except (MissingTool, Unavailable):
        return False
    return True


def _host_sources() -> list[str]:
    """Return the host's Debian mirrors for our suite as sources lines; Debian's own when it has none."""
    try:
        form = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(ORIGIN)"
        text = run_tool(["apt-get", "indextargets", "--format", form, "Created-By: Packages"])
    except (MissingTool, Unavailable):
        return list(_DEFAULT_SOURCES)
    return parse_targets(text) or list(_DEFAULT_SOURCES)


def parse_targets(text: str) -> list[str]:
    """Turn apt's index targets ("URI CODENAME COMPONENT ORIGIN" lines) into sources lines; [] if the suite is not
    complete without more (its main archive is missing)."""
    rows = {tuple(line.split()) for line in text.splitlines()}
    found = sorted(
        f"deb {row[0]} {row[1]} {row[2]}"
        for row in rows
        if len(row) == 4 and row[3] == "Debian" and row[1] in (SUITE, f"{SUITE}-updates", f"{SUITE}-security")
    )
    return found if any(f" {SUITE} main" in line for line in found) else []


def _proxy_options() -> list[str]:
    """Return apt's own proxy settings, so that the build goes the way that works for the host."""
    try:
        text = run_tool(["apt-config", "dump"])
    except (MissingTool, Unavailable):
        return []
    return re.findall(r'^(Acquire::https?::Proxy(?:::\S+)? "[^"]*");$', text, re.MULTILINE)
