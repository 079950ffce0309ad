"""Version 1 of the snapshot archive: one file that holds a snapshot and its template. An uncompressed POSIX tar:

    recess-snapshot.json           what follows, in order and size (canonical JSON, below)
    files/src_<hash>.zst           the root image and the kernel, packed; only if they were asked for
    layers/lyr_<hash>.zst  pagemaps/pmp_<hash>.zst  vmstates/vms_<hash>.zst
    manifests/snp_<hash>.json      the template's after its files, the snapshot's own last: it is the commit

Every .zst is the stored blob as it is, so `tar x` and `zstd -d` unpack it. The same snapshot under the same name always
gives the same bytes: an export that broke off can go on at its offset.

    {"format":"recess.archive","members":[["layers/lyr_..",SIZE],..],"name":"base:v1","snapshot":"snp_..","version":1}

Reading trusts nothing: plain files only, in exactly the announced order and sizes; the announcement is capped and
checked before anything else is read, and nothing is ever extracted by name. This module must know no stores.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recess.errors import Corrupt, Incompatible, Unsupported
from recess.snapshots.keys import FILE_KEY, SNAPSHOT, id_of, is_id, key_of
from recess.snapshots.manifest_v1 import FILES_MAX
from recess.snapshots.transfer import TEMPLATES_MAX, Item

FORMAT = "recess.archive"
VERSION = 1
HEADER_NAME = "recess-snapshot.json"
HEADER_BYTES_MAX = 1 << 20
MEMBERS_MAX = 2 * (FILES_MAX + 1) * (TEMPLATES_MAX + 1)
MEMBER_BYTES_MAX = 5 << 30  # what one object of an S3 store can hold
NAME_CHARS_MAX = 128
BLOCK = 512
_END = bytes(2 * BLOCK)

Read = Callable[[int], bytes]  # up to so many bytes; b"" at the end


@dataclass(frozen=True)
class Announcement:
    """The head of an archive. `name`: what the snapshot was called where it came from, or ''."""

    snapshot_id: str
    name: str
    items: tuple[Item, ...]

    @property
    def total_bytes(self) -> int:
        """Content of all members."""
        return sum(item.size_bytes for item in self.items)

    @property
    def files(self) -> dict[str, Item]:
        """The image files among the members, by the hash of their content."""
        found = ((FILE_KEY.fullmatch(item.key), item) for item in self.items)
        return {match[1]: item for match, item in found if match is not None}


def encode_announcement(announcement: Announcement) -> bytes:
    """Return the head's bytes. Raises Unsupported for what no archive can hold."""
    for item in announcement.items:
        if item.size_bytes > MEMBER_BYTES_MAX:
            raise Unsupported(f"{item.key} holds {item.size_bytes} bytes: too large for an archive")
    fields = {
        "format": FORMAT,
        "version": VERSION,
        "snapshot": announcement.snapshot_id,
        "name": announcement.name,
        "members": [[item.key, item.size_bytes] for item in announcement.items],
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def decode_announcement(data: bytes) -> Announcement:
    """Return a checked head. Raises Corrupt, Incompatible."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise _corrupt("its head is not JSON") from exc
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _corrupt("it is not an archive of a snapshot")
    if fields.get("version") != VERSION:
        version = f"archive version {fields.get('version')!r}"
        raise Incompatible(f"{version} is unknown here", reasons=[version])
    snapshot_id, name, members = fields.get("snapshot"), fields.get("name"), fields.get("members")
    if not isinstance(snapshot_id, str) or not is_id(snapshot_id, SNAPSHOT):
        raise _corrupt("its head names no snapshot")
    if not isinstance(name, str) or len(name) > NAME_CHARS_MAX or not isinstance(members, list):
        raise _corrupt("its head makes no sense")
    if not 1 <= len(members) <= MEMBERS_MAX:
        raise _corrupt(f"it announces {len(members)} files")
    items = tuple(_item(member) for member in members)
    if len({item.key for item in items}) != len(items) or items[-1].key != key_of(snapshot_id):
        raise _corrupt("it does not end with its manifest, or holds a file twice")
    return Announcement(snapshot_id, name, items)


def _item(member: object) -> Item:
    match member:
        case [str(key), int(size)] if not isinstance(size, bool) and 0 <= size <= MEMBER_BYTES_MAX:
            if id_of(key) is not None or FILE_KEY.fullmatch(key):
                return Item(key, size)
    raise _corrupt("it announces a file that no snapshot has")


def member_name(item: Item) -> str:
    """Return the path of a blob in the archive."""
    return f"{item.key}.json" if item.is_manifest else f"{item.key}.zst"


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A stretch of the archive: bytes at hand, or a blob. `size_bytes` is known before anything is read."""

    size_bytes: int
    data: bytes = b""
    item: Item | None = None


def layout(announcement: Announcement) -> list[Segment]:
    """Return the whole archive as segments, in order. Raises Unsupported."""
    head = encode_announcement(announcement)
    out = [_bytes(_tar_header(HEADER_NAME, len(head)) + head + _padding(len(head)))]
    for item in announcement.items:
        out.append(_bytes(_tar_header(member_name(item), item.size_bytes)))
        out.append(Segment(item.size_bytes, item=item))
        out.append(_bytes(_padding(item.size_bytes)))
    out.append(_bytes(_END))
    return [segment for segment in out if segment.size_bytes]


def _bytes(data: bytes) -> Segment:
    return Segment(len(data), data)


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


# --- reading ----------------------------------------------------------------------------------------------------------


class ArchiveReader:
    """Reads an archive from front to back. Raises Corrupt (not an archive, or not as announced), Incompatible."""

    def __init__(self, read: Read) -> None:
        self._read = read
        name, size = self._header()
        if name != HEADER_NAME or size > HEADER_BYTES_MAX:
            raise _corrupt("it does not begin as one")
        self.announcement = decode_announcement(self._exactly(size))
        self._exactly(-size % BLOCK)

    def members(self) -> Iterator[tuple[Item, Iterator[bytes]]]:
        """Yield each announced blob with its content, which must be taken (or left) before the next is asked for."""
        for item in self.announcement.items:
            if self._header() != (member_name(item), item.size_bytes):
                raise _corrupt(f"where {item.key[:40]} was announced there is something else")
            content = self._content(item.size_bytes)
            yield item, content
            for _ in content:  # what the caller did not want
                pass
        if self._exactly(BLOCK).strip(b"\0"):
            raise _corrupt("it goes on after its manifest")

    def _content(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            piece = self._read(min(left, 1 << 20))
            if not piece:
                raise _corrupt("it is cut short")
            left -= len(piece)
            yield piece
        self._exactly(-size % BLOCK)

    def _exactly(self, size: int) -> bytes:
        out = bytearray()
        while len(out) < size:
            piece = self._read(size - len(out))
            if not piece:
                raise _corrupt("it is cut short")
            out += piece
        return bytes(out)

    def _header(self) -> tuple[str, int]:
        """Return name and size of the next member; a plain file of a POSIX tar, nothing else."""
        block = self._exactly(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as exc:
            raise _corrupt("it is not a tar") from exc
        if info.type != tarfile.REGTYPE or block[257:263] != b"ustar\0" or not 0 <= info.size <= MEMBER_BYTES_MAX:
            raise _corrupt("it holds something else than plain files")
        return info.name, info.size


def _corrupt(why: str) -> Corrupt:
    return Corrupt(f"this archive cannot be imported: {why}")
