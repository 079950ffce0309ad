"""`recess images ls|create|inspect|rm`, and Docker's short ones: `pull`, `rmi`, `tag`, `import`, `build`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago
from recess.errors import BadInput
from recess.units import format_bytes


@click.group("images", invoke_without_command=True)
@click.pass_context
def images(ctx: click.Context) -> None:
    """Manage images; without a command, list them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(ls, as_json=False, quiet=False, template="")


@images.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List images."""
    found = inv.server.call("GET", "/v1/images")["images"]
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [
        {
            **row,
            "short": "damaged" if "damaged" in row else row["root_hash"][:12],
            "age": ago(row["created"]) if row["created"] else "",
            "size": format_bytes(row["size_bytes"]),
        }
        for row in found
    ]
    inv.out.table(rows, [("IMAGE", "name"), ("HASH", "short"), ("CREATED", "age"), ("SIZE", "size")], ids="name")
    for row in found:
        if "damaged" in row:
            inv.out.progress(f"{row['damaged']}\n  hint: {row['hint']}")


@images.command("create")
@click.option("--packages", required=True, metavar="A,B,...", help="Debian packages, on top of the base.")
@click.argument("name")
@verb
def create(inv: Invocation, name: str, packages: str) -> None:
    """Build an image NAME from Debian packages."""
    body = {"name": name, "packages": [p.strip() for p in packages.split(",") if p.strip()]}
    row = inv.act("POST", "/v1/images", body)
    inv.out.data(row, row["name"])


@images.command("inspect")
@click.argument("name")
@verb
def inspect(inv: Invocation, name: str) -> None:
    """Show one image."""
    row = inv.server.call("GET", f"/v1/images/{name}")
    inv.out.data(row, json.dumps(row, indent=2))


@images.command("rm")
@click.argument("names", nargs=-1, required=True)
@verb
def rm(inv: Invocation, names: tuple[str, ...]) -> None:
    """Remove images that no template needs."""
    _remove(inv, names)


@click.command("rmi")
@click.option("-f", "--force", is_flag=True, help="Docker's; what a machine needs stays all the same.")
@click.argument("names", nargs=-1, required=True)
@verb
def rmi(inv: Invocation, names: tuple[str, ...], force: bool) -> None:
    """Remove images (`images rm`)."""
    _remove(inv, names)


def _remove(inv: Invocation, names: tuple[str, ...]) -> None:
    for name in names:
        inv.server.call("DELETE", f"/v1/images/{name}")
        inv.out.line(name)
    if inv.out.as_json:
        inv.out.data(list(names))


@click.command("pull")
@click.option("--name", default="", help="Call it so here; default: as it was asked for.")
@click.option("--insecure", is_flag=True, help="Also without TLS, or with a certificate that proves nothing.")
@click.argument("image")
@verb
def pull(inv: Invocation, image: str, name: str, insecure: bool) -> None:
    """Take IMAGE from a registry, with Docker's own logins: python:3.12, ghcr.io/owner/name@sha256:..."""
    body = {"ref": image, "name": name, "insecure": insecure}
    row = inv.act("POST", "/v1/image-pulls", body)
    inv.out.data(row, row["name"])


@click.command("tag")
@click.argument("image")
@click.argument("name")
@verb
def tag(inv: Invocation, image: str, name: str) -> None:
    """Give IMAGE the further NAME[:TAG]; another image that has it loses it."""
    row = inv.server.call("POST", "/v1/image-tags", {"image": image, "name": name})
    inv.out.data(row, row["name"])


@click.command("import")
@click.argument("source")
@click.argument("name")
@verb
def import_(inv: Invocation, source: str, name: str) -> None:
    """Take an image from SOURCE and call it NAME: what `docker save` wrote, an OCI layout (a folder or an archive), or a
    tar of a whole file system; "-" is stdin."""
    if source != "-":
        _take(inv, str(_local(inv, source)), name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdin.tar"
        with path.open("wb") as out:
            shutil.copyfileobj(sys.stdin.buffer, out)
        _take(inv, str(path), name)


def _take(inv: Invocation, path: str, name: str) -> None:
    row = inv.act("POST", "/v1/image-imports", {"path": path, "name": name})
    inv.out.data(row, row["name"])


def _local(inv: Invocation, path: str) -> Path:
    """Return a path as the server sees it: both must be on one host."""
    if inv.config.url:
        raise BadInput("this reads files of the server's host: run it there, without RECESS_URL")
    return Path(path).expanduser().absolute()


@click.command("build")
@click.option("-t", "--tag", "name", required=True, help="Name of the image.")
@click.option("-f", "--file", "dockerfile", default="", help="The Dockerfile; default: CONTEXT/Dockerfile.")
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="For the Dockerfile's ARG.")
@click.option("--target", default="", metavar="STAGE", help="Build this stage of it; default: the last.")
@click.option("--no-cache", is_flag=True, help="Docker's; every build is one from scratch.")
@click.option("--pull", is_flag=True, help="Docker's; a build always asks the registry.")
@click.argument("context")
@verb
def build(
    inv: Invocation, context: str, name: str, dockerfile: str, arguments: tuple[str, ...], target: str, no_cache: bool,
    pull: bool,
) -> None:  # fmt: skip
    """Build an image from a Dockerfile, with buildah."""
    folder = _local(inv, context)
    file = _local(inv, dockerfile) if dockerfile else folder / "Dockerfile"
    body = {
        "context": str(folder),
        "dockerfile": str(file),
        "name": name,
        "arguments": list(arguments),
        "target": target,
    }
    row = inv.act("POST", "/v1/image-builds", body)
    inv.out.data(row, row["name"])
