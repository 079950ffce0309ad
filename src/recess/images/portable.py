"""Root images and kernels on their way to another node: packed, unpacked, and checked against the hash that names them.

A machine restored elsewhere needs exactly these files, bit for bit. They travel as independent zstd frames (`zstd -d`
unpacks them); what arrives is hashed while it is unpacked, and put in place only if it is what its name says.

A kernel from elsewhere is kept apart from those that new machines boot (`kernels-from-elsewhere/HASH/vmlinux`): a restored
machine only continues in it, and nothing of a stranger's is ever chosen for a new machine. A root is only its content:
it gets no name here. This module must know nothing of snapshots or stores.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from recess.errors import Corrupt, NotFound
from recess.frames import FRAME_RAW_BYTES_MAX
from recess.images.files import build_dir, publish_dir

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROOT = "root"
KERNEL = "kernel"
RAW_BYTES_MAX = 64 << 30
LEVEL = 6
_WINDOW_LOG_MAX = 23  # 8 MiB: more than our frames need, little enough for a stranger's to ask for
_HEX = re.compile(r"[0-9a-f]{64}")
_PLACES = {ROOT: ("roots", "root.erofs"), KERNEL: ("kernels-from-elsewhere", "vmlinux")}


def is_hash(digest: str) -> bool:
    """Tell whether this can be the hash of a file: what a manifest from elsewhere names may be anything, even a path."""
    return _HEX.fullmatch(digest) is not None


def find_file(images_dir: Path, kind: str, digest: str) -> Path | None:
    """Return the file of this kind (ROOT, KERNEL) and content on this node, or None."""
    if not is_hash(digest):
        return None
    folder, name = _PLACES[kind]
    places = [images_dir / folder / digest / name, images_dir / "kernel" / digest / "vmlinux"]
    return next((path for path in places[: 2 if kind == KERNEL else 1] if path.is_file()), None)


def packed(path: Path) -> Iterator[bytes]:
    """Yield a file as zstd frames, each of at most FRAME_RAW_BYTES_MAX of content. The same file gives the same bytes."""
    with path.open("rb") as file:
        while piece := file.read(FRAME_RAW_BYTES_MAX):
            yield zstd.compress(piece, LEVEL)


def unpacked(pieces: Iterator[bytes], digest: str) -> Iterator[bytes]:
    """Yield the content of a packed file; raises Corrupt, at the latest at its end, if it is not what `digest` names."""
    hasher, total = blake3(), 0
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
    decoder = zstd.ZstdDecompressor(options=options)
    fresh = True
    try:
        for piece in pieces:
            data: bytes = piece
            while data or not (decoder.needs_input or decoder.eof):
                raw = decoder.decompress(data, FRAME_RAW_BYTES_MAX)
                hasher.update(raw)
                total += len(raw)
                if total > RAW_BYTES_MAX:
                    raise _damaged(digest)
                yield raw
                data, fresh = b"", False
                if decoder.eof:
                    data, decoder, fresh = decoder.unused_data, zstd.ZstdDecompressor(options=options), True
    except zstd.ZstdError as exc:
        raise _damaged(digest) from exc
    if not fresh or hasher.hexdigest() != digest:
        raise _damaged(digest)


def _damaged(digest: str) -> Corrupt:
    return Corrupt(f"image file {digest[:16]} is not what its name says", blob=digest)


def install(images_dir: Path, kind: str, digest: str, source: Callable[[], Iterator[bytes]]) -> Path:
    """Unpack a file into its place, if it is not there. Raises Corrupt, OutOfSpace, NotFound (no such kind of hash)."""
    found = find_file(images_dir, kind, digest)
    if found is not None:
        return found
    if not is_hash(digest):
        raise NotFound(f"not the hash of an image file: {digest[:80]!r}", kind=kind, ref=digest[:80])
    folder, name = _PLACES[kind]
    with build_dir(images_dir) as work:
        new = work / "new"
        new.mkdir()
        with (new / name).open("wb") as file:
            for raw in unpacked(source(), digest):
                file.write(raw)
        (new / name).chmod(0o444)
        publish_dir(new, images_dir / folder / digest)
    return images_dir / folder / digest / name
