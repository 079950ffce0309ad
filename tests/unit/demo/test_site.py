import base64
import hashlib
import io
import json
import subprocess
import sys
import urllib.request
import zipfile

from recess.demo.site import make_wheel, repository


def test_the_wheel_is_deterministic_and_its_record_is_true() -> None:
    data = make_wheel()
    assert data == make_wheel()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        record = archive.read("tinysite-1.0.dist-info/RECORD").decode().splitlines()
        for path, digest, size in (
            line.split(",") for line in record if not line.startswith("tinysite-1.0.dist-info/RECORD")
        ):
            content = archive.read(path)
            wanted = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={wanted}", str(len(content)))
        assert len(record) == len(archive.namelist())


def test_the_package_serves_files_and_its_life(tmp_path) -> None:
    (tmp_path / "wheel.whl").write_bytes(repository()["vendor/tinysite-1.0-py3-none-any.whl"])
    (tmp_path / "index.html").write_text("<h1>x</h1>")
    code = (
        "import sys, threading, http.server; sys.path.insert(0, sys.argv[1]); import functools;"
        "from tinysite.__main__ import Handler;"
        "s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=sys.argv[2]));"
        "print(s.server_port, flush=True); s.serve_forever()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "wheel.whl"), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert answer.read() == b"<h1>x</h1>"
        lives = []
        for _ in range(2):
            with urllib.request.urlopen(f"{url}/_life", timeout=10) as answer:
                lives.append(json.load(answer))
        assert lives[0]["nonce"] == lives[1]["nonce"]
        assert lives[1]["served"] == lives[0]["served"] + 1
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
