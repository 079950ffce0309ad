"""A git repository served over HTTP (the "dumb" protocol), made in memory: no git program on the host is needed.

Objects are zlib streams of `type size NUL content`, named by their SHA-1 (gitformat-pack, git-http-protocol); one
commit on `main`, fixed author and date, so the same files always give the same commit id.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping

from recess.testing.http_server import HttpRequest, HttpResponse, LoopbackServer

_AUTHOR = "Recess Demo <demo@localhost> 1760000000 +0000"


def make_objects(files: Mapping[str, bytes], message: str) -> tuple[str, dict[str, bytes]]:
    """Return the commit's id and all loose objects by id. Paths may hold folders; no file is executable."""
    objects: dict[str, bytes] = {}

    def put(kind: str, content: bytes) -> str:
        raw = f"{kind} {len(content)}\0".encode() + content
        name = hashlib.sha1(raw, usedforsecurity=False).hexdigest()
        objects[name] = zlib.compress(raw)
        return name

    def put_tree(prefix: str) -> str:
        rows: dict[str, tuple[str, str]] = {}
        for path, content in files.items():
            if not path.startswith(prefix):
                continue
            name, slash, _ = path.removeprefix(prefix).partition("/")
            if not slash:
                rows[name] = ("100644", put("blob", content))
            elif name + "/" not in rows:
                rows[name + "/"] = ("40000", put_tree(f"{prefix}{name}/"))
        # git sorts folders as if their names ended in a slash
        body = b"".join(
            f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(object_id)
            for name, (mode, object_id) in sorted(rows.items())
        )
        return put("tree", body)

    tree = put_tree("")
    commit = f"tree {tree}\nauthor {_AUTHOR}\ncommitter {_AUTHOR}\n\n{message}\n"
    return put("commit", commit.encode()), objects


class GitServer(LoopbackServer):
    """Serves one repository at `/NAME.git`; `served` counts objects handed out."""

    def __init__(self, name: str, files: Mapping[str, bytes], message: str = "First commit", *, port: int = 0) -> None:
        super().__init__(port)
        self.name = name
        self.commit, self._objects = make_objects(files, message)
        self.served = 0

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Serve a file of the repository; the query (`?service=git-upload-pack`) is ignored, which means "dumb"."""
        prefix = f"/{self.name}.git/"
        if request.method != "GET" or not request.path.startswith(prefix):
            return HttpResponse(404, b"no such repository\n", "text/plain")
        path = request.path.removeprefix(prefix)
        if path == "info/refs":
            return HttpResponse(200, f"{self.commit}\trefs/heads/main\n".encode(), "text/plain")
        if path == "HEAD":
            return HttpResponse(200, b"ref: refs/heads/main\n", "text/plain")
        if path.startswith("objects/"):
            found = self._objects.get(path.removeprefix("objects/").replace("/", ""))
            if found is not None:
                self.served += 1
                return HttpResponse(200, found, "application/x-git-loose-object")
        return HttpResponse(404, b"not found\n", "text/plain")
