"""A writer, and reader of its own, of cpio archives in the "newc" form, which the Linux kernel unpacks as its initial root.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Deterministic: time 0, owner root,
inode numbers by order. Knows nothing of what is inside.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from recess.errors import Corrupt

_TRAILER = "TRAILER!!!"
_HEAD_BYTES = 110


@dataclass(frozen=True)
class Entry:
    """One file or folder: `path` without a leading slash, `mode` with its file type bits."""

    path: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """Return a folder's entry, mode 0755."""
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, *, executable: bool = False) -> Entry:
    """Return a file's entry."""
    return Entry(path, stat.S_IFREG | (0o755 if executable else 0o644), data)


def device(path: str, major: int, minor: int) -> Entry:
    """Return a character device's entry, mode 0600."""
    return Entry(path, stat.S_IFCHR | 0o600, rdev=(major, minor))


def _record(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = [inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.rdev, len(name), 0]
    head = b"070701" + b"".join(b"%08x" % n for n in numbers) + name
    return head + bytes(-len(head) % 4) + entry.data + bytes(-len(entry.data) % 4)


def read_file(data: bytes, path: str) -> bytes:
    """Return a file's content out of an archive of ours. Raises Corrupt when it is not there or the archive is cut."""
    at = 0
    try:
        while data[at : at + 6] == b"070701":
            size, name_size = int(data[at + 54 : at + 62], 16), int(data[at + 94 : at + 102], 16)
            start = at + -(-(_HEAD_BYTES + name_size) // 4) * 4
            name = data[at + _HEAD_BYTES : at + _HEAD_BYTES + name_size - 1]
            if name == path.encode() and start + size <= len(data):
                return data[start : start + size]
            at = start + -(-size // 4) * 4
    except ValueError as exc:
        raise Corrupt(f"the archive is damaged: {exc}") from exc
    raise Corrupt(f"the archive holds no whole file {path!r}")


def archive(entries: list[Entry]) -> bytes:
    """Return the archive, padded to 512 bytes. A file's parent folders must come before it."""
    body = b"".join(_record(i, e) for i, e in enumerate(entries, 1)) + _record(0, Entry(_TRAILER, 0))
    return body + bytes(-len(body) % 512)
