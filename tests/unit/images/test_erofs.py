import itertools
import os
import stat
import struct

import pytest

from recess.errors import Corrupt
from recess.images import erofs
from recess.images.tree import Node, with_parents


class Reader:
    """A reader of the format written from its specification, not from the writer."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        fields = struct.unpack_from("<IIIBBH", data, 1024)
        self.magic, self.checksum, self.compat, self.block_bits, _, root = fields
        (self.meta_block,) = struct.unpack_from("<I", data, 1024 + 40)
        (self.blocks,) = struct.unpack_from("<I", data, 1024 + 36)
        self.tree: dict[str, dict] = {}
        self._walk("", root)

    def _inode(self, nid: int) -> dict:
        at = self.meta_block * 4096 + nid * 32
        form, xattrs, mode, _, size, place, _, uid, gid, mtime, _, links = struct.unpack_from(
            "<HHHHQIIIIQII", self.data, at
        )
        assert form & 1, "extended inodes only"
        xattr_size = 12 + 4 * (xattrs - 1) if xattrs else 0
        start = at + 64 + xattr_size if form >> 1 == 2 else place * 4096
        if form >> 1 == 2:
            assert (at + 64 + xattr_size) // 4096 == (start + size - 1) // 4096, "inline data crosses a block"
        out = {"nid": nid, "mode": mode, "uid": uid, "gid": gid, "mtime": mtime, "links": links, "place": place}
        out["data"] = b"" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else self.data[start : start + size]
        out["inline"] = form >> 1 == 2
        out["xattrs"] = self.data[at + 64 : at + 64 + xattr_size]
        return out

    def _walk(self, path: str, nid: int) -> None:
        inode = self.tree[path] = self._inode(nid)
        if not stat.S_ISDIR(inode["mode"]):
            return
        names = []
        for block in range(0, len(inode["data"]), 4096):
            part = inode["data"][block : block + 4096]
            count = struct.unpack_from("<H", part, 8)[0] // 12
            heads = [struct.unpack_from("<QHBB", part, 12 * i) for i in range(count)]
            for i, (child, offset, _kind, _) in enumerate(heads):
                end = heads[i + 1][1] if i + 1 < count else len(part)
                names.append((part[offset:end].split(b"\0")[0], child))
        assert names == sorted(names), "the kernel searches by bisection"
        for name, child in names:
            if name not in (b".", b".."):
                self._walk(f"{path}/{name.decode()}".lstrip("/"), child)


def image(tmp_path, nodes: dict[str, Node], archive: bytes = b"") -> Reader:
    source = tmp_path / "archive"
    source.write_bytes(archive)
    target = tmp_path / "image"
    size = erofs.write_image(with_parents(nodes), source, target)
    data = target.read_bytes()
    assert len(data) == size == size // 4096 * 4096
    return Reader(data)


def file(path: str, data: bytes, **fields) -> Node:
    return Node(path, stat.S_IFREG | 0o644, size=len(data), data=data, **fields)


def test_files_folders_links_and_devices_come_back(tmp_path):
    nodes = {
        "etc/passwd": file("etc/passwd", b"root", uid=1, gid=2, mtime_s=3),
        "etc/empty": file("etc/empty", b""),
        "big": Node("big", stat.S_IFREG | 0o755, size=5000, offset=100),
        "bin": Node("bin", stat.S_IFLNK | 0o777, size=7, data=b"usr/bin"),
        "null": Node("null", stat.S_IFCHR | 0o666, device=(1, 300)),
    }
    archive = os.urandom(6000)
    found = image(tmp_path, nodes, archive).tree
    assert found["etc/passwd"]["data"] == b"root"
    assert [found["etc/passwd"][k] for k in ("uid", "gid", "mtime", "links")] == [1, 2, 3, 1]
    assert found["etc/empty"]["data"] == b""
    assert found["big"]["data"] == archive[100:5100]
    assert found["bin"]["data"] == b"usr/bin"
    assert found["null"]["place"] == (300 & 0xFF) | (1 << 8) | ((300 & ~0xFF) << 12)
    assert found[""]["links"] == 3
    assert found["etc"]["links"] == 2


def test_every_file_starts_on_a_block_and_no_two_share_one(tmp_path):
    nodes = {f"f{i}": file(f"f{i}", bytes([i + 1]) * (i * 1500 + 1)) for i in range(10)}
    reader = image(tmp_path, nodes)
    spans = sorted((reader.tree[p]["place"], -(-len(n.data) // 4096)) for p, n in nodes.items())
    assert not any(reader.tree[p]["inline"] for p in nodes)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


def test_a_large_folder_spans_blocks_in_order(tmp_path):
    nodes = {f"d/{'n' * 50}{i:04}": file("x", b"%d" % i) for i in range(500)}
    nodes = {p: Node(p, n.mode, size=n.size, data=n.data) for p, n in nodes.items()}
    reader = image(tmp_path, nodes)
    assert {p: reader.tree[p]["data"] for p in nodes} == {p: n.data for p, n in nodes.items()}


def test_many_links_never_cross_a_block_inline(tmp_path):
    nodes = {f"l{i}": Node(f"l{i}", stat.S_IFLNK | 0o777, data=b"t" * (i * 7 % 1500 + 1)) for i in range(300)}
    reader = image(tmp_path, nodes)  # the reader asserts it for each
    assert all(reader.tree[p]["data"] == n.data for p, n in nodes.items())


def test_hard_links_share_an_inode(tmp_path):
    nodes = {"a": file("a", b"x"), "b": Node("b", 0, hardlink_to="a"), "c": Node("c", 0, hardlink_to="b")}
    tree = image(tmp_path, nodes).tree
    assert tree["a"]["nid"] == tree["b"]["nid"] == tree["c"]["nid"]
    assert tree["a"]["links"] == 3


@pytest.mark.parametrize("target", ["nowhere", "b"])
def test_a_hard_link_to_nothing_is_corrupt(tmp_path, target):
    with pytest.raises(Corrupt, match="leads nowhere"):
        image(tmp_path, {"b": Node("b", 0, hardlink_to=target)})


def test_a_file_below_a_file_is_corrupt(tmp_path):
    with pytest.raises(Corrupt, match="no folder"):
        image(tmp_path, {"a": file("a", b"x"), "a/b": file("a/b", b"y")})


def test_a_short_archive_is_corrupt(tmp_path):
    with pytest.raises(Corrupt, match="ends inside"):
        image(tmp_path, {"a": Node("a", stat.S_IFREG, size=100, offset=50)}, bytes(60))


def test_capabilities_are_kept(tmp_path):
    tree = image(tmp_path, {"ping": file("ping", b"x", xattrs={"security.capability": b"\x01\x02\x03"})}).tree
    body = tree["ping"]["xattrs"]
    length, index, size = struct.unpack_from("<BBH", body, 12)
    assert (index, body[16 : 16 + length], body[16 + length : 16 + length + size]) == (6, b"capability", b"\1\2\3")


def test_the_output_depends_on_the_tree_alone(tmp_path):
    nodes = with_parents({p: file(p, p.encode()) for p in ("z", "a/b", "m")})
    first, second = tmp_path / "1", tmp_path / "2"
    (tmp_path / "none").write_bytes(b"")
    erofs.write_image(nodes, tmp_path / "none", first)
    erofs.write_image(dict(reversed(nodes.items())), tmp_path / "none", second)
    assert first.read_bytes() == second.read_bytes()


def test_the_superblock_is_checksummed(tmp_path):
    reader = image(tmp_path, {"a": file("a", b"x")})
    block = bytearray(reader.data[1024:4096])
    block[4:8] = bytes(4)
    assert reader.magic == 0xE0F5E1E2
    assert reader.blocks * 4096 == len(reader.data)
    assert reader.checksum == erofs._crc32c(bytes(block))
    assert erofs._crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283  # the check value of CRC-32C
