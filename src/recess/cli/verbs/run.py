"""`recess run`: start a machine from an image and run a command in it, Docker's flags where Docker has them."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import click

from recess.cli.common import Invocation, new_key, parse_env, parse_pairs, parse_port, verb
from recess.cli.terminal import converse, size
from recess.errors import BadInput, NotFound
from recess.sdk.exec_stream import ExecStream


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Leave it running and print its id.")
@click.option("-i", "--interactive", is_flag=True, help="Keep stdin open.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("--rm", "remove", is_flag=True, help="Remove the machine when its command has ended.")
@click.option("--name", default="", help="Name of the machine.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Environment of the command.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Environment from a file.")
@click.option("-w", "--workdir", default="/root", help="Working folder.")
@click.option("-u", "--user", default="root", help="User, or uid[:gid].")
@click.option("-m", "--memory", default="512M", help="Memory.")
@click.option("--cpus", default=1, help="Virtual CPUs.")
@click.option("--disk", default="4G", help="Size of the writable disk.")
@click.option("-p", "--publish", multiple=True, metavar="[IP:][HOST:]GUEST", help="Publish a port on 127.0.0.1.")
@click.option("--net", "network", default="broker", type=click.Choice(["broker", "none", "full"]), help="Network.")
@click.option("--allow", multiple=True, metavar="HOST", help="Let it reach a host, *.domain, cidr or host:port.")
@click.option("--route", multiple=True, metavar="NAME=URL", help="A base-URL route of the broker.")
@click.option("-l", "--label", multiple=True, metavar="NAME=VALUE", help="Label.")
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@verb
def run(inv: Invocation, image: str, command: tuple[str, ...], **flags: Any) -> int:
    """Start a machine from IMAGE and run COMMAND in it; its exit code is this command's."""
    if flags["detach"] and flags["remove"] and not command:
        raise BadInput("--rm needs a command whose end ends the machine")
    argv = list(command)
    if not argv and not flags["detach"]:
        argv = ["/bin/bash"] if flags["tty"] else ["/bin/sh"]
    spec = {
        "image": image,
        "argv": argv,
        "memory_bytes": flags["memory"],
        "disk_bytes": flags["disk"],
        "cpus": flags["cpus"],
        "env": parse_env(flags["env"], flags["env_file"], dict(os.environ)),
        "cwd": flags["workdir"],
        "user": flags["user"],
        "tty": flags["tty"],
        "stdin": flags["interactive"],
        "remove_on_exit": flags["remove"],
        "network": flags["network"],
        "allow": list(flags["allow"]),
        "routes": parse_pairs(flags["route"], "--route"),
        "ports": [list(parse_port(p)) for p in flags["publish"]],
        "labels": parse_pairs(flags["label"], "--label"),
    }
    body = {"name": flags["name"], "spec": spec}
    row = inv.server.call_with_progress("POST", "/v1/machines", body, inv.out.progress, key=new_key())
    if flags["detach"]:
        inv.out.data(row, row["id"])
        return 0
    stream = ExecStream(inv.server, row["id"], {"attach": "main"})
    if flags["tty"]:
        stream.resize(*size())
    code = converse(stream, is_tty=flags["tty"], stdin=flags["interactive"])
    sys.stdout.flush()
    if flags["remove"]:
        # The server forgets it too, a little later, so that a second client may still read its last output.
        with contextlib.suppress(NotFound):
            inv.server.call("DELETE", f"/v1/machines/{row['id']}", query={"force": 1})
    return code
