"""A file tree as plain data: read from a tar archive, cleaned, made the same for everybody who builds it.

A tar archive, not a folder, is what images are made from, because an ordinary user cannot keep owners, device nodes
or capabilities in a folder. The archive stays on disk; a node only remembers where its content is. The cleaning
rules are pure functions. This module must know nothing of filesystems' formats or of where the archive came from.
"""

from __future__ import annotations

import fnmatch
import stat
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from recess.errors import Corrupt

FOLDER = stat.S_IFDIR
_MAX_ENTRIES = 2_000_000
_KINDS = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.AREGTYPE: stat.S_IFREG,
    tarfile.CONTTYPE: stat.S_IFREG,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


@dataclass(frozen=True)
class Node:
    """One inode. `path` has no leading slash; the root is "". `mode` includes the file type bits.

    A file's content is `data` if that is not None, else `size` bytes of the archive at `offset`. A symbolic link's
    target is `data`. `hardlink_to` names another path that holds the inode; everything else is then ignored.
    """

    path: str
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_s: int = 0
    size: int = 0
    offset: int = 0
    data: bytes | None = None
    device: tuple[int, int] = (0, 0)
    hardlink_to: str = ""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


def read_tar(path: Path) -> dict[str, Node]:
    """Return the nodes of an uncompressed tar archive by path; folders it leaves out are made (root, 0755).

    Raises Corrupt for a damaged archive, a path that leaves the tree, a sparse file, or too many entries.
    """
    nodes: dict[str, Node] = {}
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                node = node_of(member)
                nodes[node.path] = node
                if len(nodes) > _MAX_ENTRIES:
                    raise Corrupt(f"the tree has more than {_MAX_ENTRIES} entries")
    except (tarfile.TarError, EOFError, UnicodeError) as exc:
        raise Corrupt(f"the image's archive cannot be read: {exc}") from exc
    return with_parents(nodes)


def node_of(member: tarfile.TarInfo) -> Node:
    """Return a member of an archive as a node. Raises Corrupt for one that leaves the tree or is of an unknown kind."""
    parts = [p for p in member.name.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise Corrupt(f"the archive holds a path outside its tree: {member.name!r}")
    path = "/".join(parts)
    attributes = {
        key.removeprefix("SCHILY.xattr."): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith("SCHILY.xattr.")
    }
    if member.islnk():
        target = "/".join(p for p in member.linkname.split("/") if p not in ("", "."))
        return Node(path, 0, hardlink_to=target)
    kind = _KINDS.get(member.type)
    if kind is None:
        raise Corrupt(f"the archive holds an entry of unknown kind: {member.name!r}")
    link = member.linkname.encode("utf-8", "surrogateescape") if member.issym() else None
    return Node(
        path,
        kind | (member.mode & 0o7777),
        uid=member.uid,
        gid=member.gid,
        mtime_s=int(member.mtime),
        size=member.size if kind == stat.S_IFREG else len(link or b""),
        offset=member.offset_data,
        data=link,
        device=(member.devmajor, member.devminor),
        xattrs=attributes,
    )


def with_parents(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Return the nodes and a folder for every parent that is missing."""
    out = dict(nodes)
    for path in ["", *nodes]:
        parent = path
        while parent:
            parent = parent.rpartition("/")[0]
            out.setdefault(parent, Node(parent, stat.S_IFDIR | 0o755))
        out.setdefault("", Node("", stat.S_IFDIR | 0o755))
    return out


def prune(nodes: Mapping[str, Node], drop: Iterable[str], keep: Iterable[str] = ()) -> dict[str, Node]:
    """Return the nodes without those matching a `drop` pattern (shell-like, `*` crosses slashes) and no `keep` one.

    A file that is hard-linked from a kept path stays under that path.
    """
    dropped, kept = tuple(drop), tuple(keep)

    def gone(path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, p) for p in dropped) and not any(
            fnmatch.fnmatchcase(path, p) for p in kept
        )

    away = {path for path in nodes if path and gone(path)}
    heirs: dict[str, str] = {}
    out: dict[str, Node] = {}
    for path, node in nodes.items():
        if path in away:
            continue
        target = node.hardlink_to
        if target in away:
            if target in heirs:
                out[path] = replace(node, hardlink_to=heirs[target])
            else:
                heirs[target] = path
                out[path] = replace(nodes[target], path=path)
        else:
            out[path] = node
    return with_parents(out)


def settle_times(nodes: Mapping[str, Node], build_started_s: int) -> dict[str, Node]:
    """Return the nodes with every time of the build itself set to the newest time that came with the packages.

    Two builds of the same packages then agree. Package files keep their times: Python checks its compiled files
    against them.
    """
    older = [n.mtime_s for n in nodes.values() if not n.hardlink_to and n.mtime_s < build_started_s]
    newest = max(older, default=0)
    return {p: n if n.mtime_s < build_started_s else replace(n, mtime_s=newest) for p, n in nodes.items()}


def put_file(nodes: dict[str, Node], path: str, content: bytes, mode: int = 0o644, mtime_s: int = 0) -> None:
    """Add or replace a small file, owner root."""
    nodes[path] = Node(path, stat.S_IFREG | mode, size=len(content), data=content, mtime_s=mtime_s)
    nodes.update(with_parents(nodes))


def with_content(node: Node, content: bytes) -> Node:
    """Return the file with other content, everything else kept."""
    return replace(node, size=len(content), data=content)
