"""Images out of a real registry (Debian's docker-registry on loopback) and out of files, run in real machines."""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from recess.errors import Refused
from recess.images import ImageStore
from recess.images.registry import Sources
from recess.testing.oci_image import ImageMaker

BUSYBOX = Path("/bin/busybox")  # Debian's static one
CONFIG = (
    "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:0}}\n"
)


def tar(*entries):
    """Entries: (name, bytes for a file, text for a link, None for a folder)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


# The password is "secret" (bcrypt).
USERS = "dev:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


@contextlib.contextmanager
def serving(tmp_path, more=""):
    """A registry on a port that the kernel chose; yields its address."""
    (tmp_path / "registry.yml").write_text(CONFIG.format(tmp_path / "registry") + more)
    command = ["docker-registry", "serve", str(tmp_path / "registry.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                found = re.search(r"listening on (127\.0\.0\.1:\d+)", line)
                if found:
                    break
            assert found, "the registry ended"
            yield found[1]
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def registry(tmp_path):
    with serving(tmp_path) as address:
        yield address


def push(layout, address, *options):
    command = ["skopeo", "--insecure-policy", "copy", "--all", *options, "--dest-tls-verify=false"]
    subprocess.run([*command, f"oci:{layout}", f"docker://{address}"], check=True, capture_output=True)


@pytest.fixture
def demo(tmp_path):
    """A layout with an image for two kinds of machines: a shell and a user, a file that the second layer takes away."""
    links = [(f"bin/{name}", "busybox") for name in ("sh", "cat", "id", "pwd", "ls", "echo")]
    users = b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n"
    lower = tar(
        ("bin", None), ("bin/busybox", BUSYBOX.read_bytes()), *links, ("etc/passwd", users), ("srv/old", b"old")
    )
    upper = tar(("srv/.wh.old", b""), ("srv/new", b"new\n"))
    config = {
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["cat new; id -un; pwd; echo $WHO; ls"], "Env": ["WHO=image", "PATH=/bin"],
        "WorkingDir": "/srv", "User": "app", "ExposedPorts": {"80/tcp": {}},
    }  # fmt: skip
    maker = ImageMaker(tmp_path / "layout")
    ours = maker.manifest([lower, upper], config, packing="zstd")
    maker.finish([maker.index([maker.manifest([lower], {}, architecture="arm64"), ours])])
    return maker.folder


@pytest.fixture
def recess(real_config, images_dir):
    """The command line on a home with the shared kernel and images of its own."""
    images = real_config.home / "images"
    images.unlink()
    images.mkdir()
    for name in ("kernel", "initrd"):
        (images / name).symlink_to(images_dir / name)
    env = {
        "PATH": os.environ["PATH"], "HOME": str(real_config.home), "RECESS_HOME": str(real_config.home),
        "RECESS_RUN_DIR": str(real_config.run_dir), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip

    def run(*args, expect=0):
        command = [sys.executable, "-m", "recess.cli.main", *args]
        done = subprocess.run(command, capture_output=True, env=env, timeout=240)
        assert done.returncode == expect, (args, done.returncode, done.stdout, done.stderr)
        run.said = done.stderr.decode()
        return done.stdout.decode()

    yield run
    run("down", "--all")


@pytest.mark.timeout(400)
def test_an_image_of_a_registry_runs_as_it_says_and_as_it_is_told(recess, registry, demo):
    ref = f"{registry}/team/demo:1"
    push(demo, ref)
    small = ("-m", "128M", "--disk", "128M")
    assert recess("run", "--rm", *small, ref) == "new\napp\n/srv\nimage\nnew\n"  # pulled, as it is not here
    assert recess("run", "--rm", *small, "--pull", "never", ref, "echo $0 told") == "/bin/sh told\n"
    own = ("-e", "WHO=me", "-w", "/bin", "-u", "root", "--entrypoint", "/bin/sh")
    assert recess("run", "--rm", *small, *own, ref, "-c", "echo $WHO; pwd; id -u") == "me\n/bin\n0\n"
    recess("tag", ref, "mine")
    images = json.loads(recess("images", "ls", "--json"))["data"]
    assert [row["name"] for row in images] == [ref, "mine:latest"]
    assert images[0]["source"].startswith(f"docker://{ref}@sha256:")
    assert recess("run", "--rm", *small, "mine", "exit 0") == ""
    recess("pull", f"{registry}/team/none:1", expect=1)
    recess("run", "--rm", "--pull", "never", f"{registry}/team/none:1", expect=125)


@pytest.mark.timeout(400)
def test_an_image_without_shell_or_libc_is_imported_from_an_archive_and_runs(recess, tmp_path):
    maker = ImageMaker(tmp_path / "tiny")
    maker.finish([maker.manifest([tar(("busybox", BUSYBOX.read_bytes()))], {"Entrypoint": ["/busybox", "echo", "hi"]})])
    saved = tmp_path / "saved.tar"
    # As `docker save` writes it.
    command = ["skopeo", "--insecure-policy", "copy", f"oci:{maker.folder}", f"docker-archive:{saved}:tiny:1"]
    subprocess.run(command, check=True, capture_output=True)
    assert recess("import", str(saved), "tiny:1").strip() == "tiny:1"
    assert recess("run", "--rm", "-m", "128M", "--disk", "128M", "tiny:1", "there") == "hi there\n"
    recess("run", "--rm", "-m", "128M", "--disk", "128M", "--entrypoint", "/bin/sh", "tiny:1", expect=127)
    assert recess("images", "inspect", "tiny:1", "--format", "{{.config.WorkingDir}}") == "/\n"


DOCKERFILE = """
ARG BASE
FROM $BASE AS lower
ARG WORD=none
ENV GREETING=$WORD
USER root
RUN echo made of $WORD > /srv/made
USER app
FROM lower
COPY file /srv/copied
EXPOSE 8080
CMD ["cat made copied; echo $GREETING; id -un"]
"""


@pytest.mark.timeout(400)
def test_a_dockerfile_on_an_image_of_a_registry_is_built_and_runs(recess, registry, demo, tmp_path):
    ref = f"{registry}/team/demo:1"
    push(demo, ref)
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "file").write_text("copied\n")
    words = (
        "build",
        "-t",
        "built:1",
        "--build-arg",
        f"BASE={ref}",
        "--build-arg",
        "WORD=clay",
        "--no-cache",
        str(context),
    )
    assert recess(*words) == "built:1\n"
    small = ("-m", "128M", "--disk", "128M")
    assert recess("run", "--rm", *small, "built:1") == "made of clay\ncopied\nclay\napp\n"
    recess(*words[:2], "lower:1", *words[3:], "--target", "lower")
    config = json.loads(recess("images", "inspect", "lower:1", "--json"))["data"]["config"]
    assert "GREETING=clay" in config["Env"]
    assert config["Cmd"] == ["cat new; id -un; pwd; echo $WHO; ls"]
    (context / "Dockerfile").write_text(DOCKERFILE.replace("echo made", "false && echo made"))
    recess(*words, expect=1)
    assert "buildah failed" in recess.said
    # What is changed in a machine is an image, too.
    recess("create", "--name", "dev", "-u", "root", *small, "built:1", "echo more > more; cat more")
    recess("start", "-a", "dev")
    recess("start", "dev")
    recess("commit", "dev", "committed:1")
    assert recess("run", "--rm", *small, "committed:1", "cat copied more") == "copied\nmore\n"
    # And so is what a Dockerfile stands on: no registry has it.
    (context / "Dockerfile").write_text("ARG BASE\nFROM $BASE\nUSER root\nRUN cat more copied > both\n")
    recess("build", "-t", "own:1", "--build-arg", "BASE=committed:1", str(context))
    assert "committed:1 is an image here" in recess.said
    assert recess("run", "--rm", *small, "own:1", "cat both") == "more\ncopied\n"


def test_a_private_registry_is_read_by_dockers_own_login(demo, tmp_path, monkeypatch):
    for name in ("XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "users").write_text(USERS)
    with serving(tmp_path, f"auth: {{htpasswd: {{realm: r, path: {tmp_path / 'users'}}}}}\n") as address:
        push(demo, f"{address}/team/demo:1", "--dest-creds", "dev:secret")
        store = ImageStore(tmp_path / "images")
        with pytest.raises(Refused, match="login"):
            Sources(store).pull(f"{address}/team/demo:1", print)
        login = {"auths": {address: {"auth": base64.b64encode(b"dev:secret").decode()}}}
        (tmp_path / ".docker").mkdir()
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(login))
        assert Sources(store).pull(f"{address}/team/demo:1", print).config["User"] == "app"


def test_the_same_root_out_of_a_layout_an_archive_and_a_tar(tmp_path):
    store = ImageStore(tmp_path / "images")
    sources = Sources(store)
    root = tar(("etc", None), ("etc/motd", b"hello\n"), ("etc/link", "motd"))
    maker = ImageMaker(tmp_path / "layout")
    maker.finish([maker.manifest([root], {})])
    (tmp_path / "root.tar").write_bytes(root)
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", f"oci:{maker.folder}", f"oci-archive:{tmp_path}/oci.tar"],
        check=True, capture_output=True,
    )  # fmt: skip
    lines = []
    made = [
        sources.take_in(path, f"demo:{number}", lines.append)
        for number, path in enumerate((maker.folder, tmp_path / "oci.tar", tmp_path / "root.tar"))
    ]
    assert len({info.root_hash for info in made}) == 1
    assert made[0].source.endswith(made[1].source[-64:])
    assert "unpacking layer 1 of 1" in lines
    store.remove("demo:0")
    assert [info.name for info in store.list()] == ["demo:1", "demo:2"]
