"""The repository the story's agent clones: a tiny site, and a local Python package (a wheel) that serves it.

`tinysite` is an ordinary threaded web server. Besides files it answers `/_life` with what only its memory knows: a
nonce made at start, its process id, a count of answers, and how long it has run by its own clock.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile

VERSION = "1.0"
_DATE = (2025, 10, 9, 0, 0, 0)

_SERVER = '''"""Serve a folder over HTTP: python3 -m tinysite FOLDER PORT."""

import functools
import http.server
import json
import os
import secrets
import sys
import time

STARTED = time.monotonic()
NONCE = secrets.token_hex(16)
SERVED = [0]


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        SERVED[0] += 1
        if self.path != "/_life":
            return super().do_GET()
        life = {"nonce": NONCE, "pid": os.getpid(), "served": SERVED[0], "up_s": time.monotonic() - STARTED}
        body = json.dumps(life).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main():
    folder, port = sys.argv[1], int(sys.argv[2])
    handler = functools.partial(Handler, directory=folder)
    http.server.ThreadingHTTPServer(("0.0.0.0", port), handler).serve_forever()


if __name__ == "__main__":
    main()
'''


def make_wheel() -> bytes:
    """Return tinysite as a wheel (PEP 427), byte for byte the same each time."""
    info = f"tinysite-{VERSION}.dist-info"
    files = {
        "tinysite/__init__.py": f'"""A tiny web server."""\n\n__version__ = "{VERSION}"\n'.encode(),
        "tinysite/__main__.py": _SERVER.encode(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tinysite\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: recess\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*rows, f"{info}/RECORD,,"]) + "\n").encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path, _DATE), data)
    return out.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def repository() -> dict[str, bytes]:
    """Return the repository's files."""
    install = (
        "#!/bin/sh\n# Installs the local package; no index, no network.\n"
        "exec python3 -m pip install --quiet --no-index --no-compile --disable-pip-version-check "
        "--root-user-action=ignore --break-system-packages --find-links vendor tinysite\n"
    )
    return {
        "README.md": b"# A small site\n\nRun `sh install.sh`, then `python3 -m tinysite . 8000`.\n",
        "index.html": b"<!doctype html><title>Empty</title>\n",
        "install.sh": install.encode(),
        f"vendor/tinysite-{VERSION}-py3-none-any.whl": make_wheel(),
    }
