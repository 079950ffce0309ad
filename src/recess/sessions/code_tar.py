"""The code of one agent version as a tar archive: the user's files and the in-guest SDK beside them. Pure but for reading
the SDK's own files.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from recess.errors import MissingTool

GUEST_ROOT = "/opt/recess/agent"
PIECE = 32 * 1024


def guest_folder(version: str) -> str:
    """Return where a version lives in the guest."""
    return f"{GUEST_ROOT}/{version}"


def sdk_files(package_dir: Path) -> dict[str, bytes]:
    """Return the SDK's files by path. `package_dir` holds recess_agent/. Raises MissingTool."""
    root = package_dir / "recess_agent"
    found = {f"recess_agent/{one.name}": one.read_bytes() for one in sorted(root.glob("*.py"))}
    if "recess_agent/__main__.py" not in found:
        raise MissingTool(f"the in-guest SDK is not at {package_dir}", hint="set RECESS_AGENT_DIR")
    return found


def build(files: Mapping[str, bytes]) -> bytes:
    """Return a ustar archive of plain files, folders included, the same bytes for the same files."""
    out = io.BytesIO()
    folders: set[str] = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(files):
            for folder in reversed(Path(path).parents):
                name = str(folder)
                if name != "." and name not in folders:
                    folders.add(name)
                    info = tarfile.TarInfo(name)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(files[path]), 0o644
            archive.addfile(info, io.BytesIO(files[path]))
    return out.getvalue()


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    """Yield the archive in pieces that fit a frame."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
