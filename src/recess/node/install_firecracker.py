"""`recess doctor --install-firecracker`: the official release, by a pinned checksum, into the home's `bin`.

Nothing of the archive is unpacked before its checksum is right, and of it only the two programs, by their exact names. No
registry has the binary; where the release cannot be reached the error says what to put where.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from recess.errors import Corrupt, Unavailable
from recess.images.files import space_errors
from recess.units import MIB

VERSION = "1.16.1"
ARCHIVE = f"firecracker-v{VERSION}-x86_64.tgz"
URL = f"https://github.com/firecracker-microvm/firecracker/releases/download/v{VERSION}/{ARCHIVE}"
SHA256 = "382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6"
"""Of the archive, as published beside it (ARCHIVE.sha256.txt)."""

_ARCHIVE_MAX = 128 * MIB
_PROGRAM_MAX = 64 * MIB
_PROGRAMS = ("firecracker", "jailer")
_TIMEOUT_S = 60.0


def install_firecracker(home: Path, *, url: str = URL, sha256: str = SHA256) -> Path:
    """Fetch the release and return the program's path; one that is there is replaced by rename, so that VMs that run keep
    theirs. Blocks. Raises Unavailable, Corrupt (another checksum, a program missing in it), OutOfSpace."""
    folder = home / "bin"
    data = _download(url, folder)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise Corrupt(
            f"{ARCHIVE} has the checksum {found}, not {sha256}: nothing was installed",
            hint="try again; if it stays so, something between here and there answers in the release's place",
        )
    programs = _programs(data)
    with space_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in programs.items():
            aside = folder / f".{name}.new"
            aside.write_bytes(content)
            aside.chmod(0o755)
            aside.replace(folder / name)
    return folder / _PROGRAMS[0]


def _download(url: str, folder: Path) -> bytes:
    try:
        with contextlib.closing(urllib.request.urlopen(url, timeout=_TIMEOUT_S)) as answer:
            data: bytes = answer.read(_ARCHIVE_MAX + 1)
    except (OSError, http.client.HTTPException) as exc:
        if isinstance(exc, urllib.error.HTTPError):
            exc.close()  # it is the answer, too
        raise Unavailable(
            f"the release cannot be fetched: {getattr(exc, 'reason', exc)}",
            hint=f"fetch {URL} elsewhere, check that its SHA-256 is {SHA256}, and put the program in it as "
            f"{folder / _PROGRAMS[0]} (or anywhere, and set RECESS_FIRECRACKER_BIN)",
        ) from exc
    if len(data) > _ARCHIVE_MAX:
        raise Corrupt(f"{url} is larger than {_ARCHIVE_MAX >> 20} MiB")
    return data


def _programs(data: bytes) -> dict[str, bytes]:
    """Return the programs of the archive by name."""
    top, suffix = f"release-v{VERSION}-x86_64", f"-v{VERSION}-x86_64"
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for name in _PROGRAMS:
                member = archive.getmember(f"{top}/{name}{suffix}")
                handle = archive.extractfile(member) if member.isfile() and member.size <= _PROGRAM_MAX else None
                if handle is None:
                    raise Corrupt(f"{ARCHIVE} holds no program {name} of a sensible size")
                found[name] = handle.read()
    except (tarfile.TarError, KeyError, EOFError, OSError) as exc:
        raise Corrupt(f"{ARCHIVE} cannot be unpacked: {exc}") from exc
    return found
