"""The flags that `run` and `create` share, Docker's where Docker has them, and the machine spec they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from recess.cli.common import callers_env, parse_env, parse_pairs, parse_port
from recess.cli.volume_flags import parse_mount, parse_socket, parse_volume, split_sockets
from recess.units import parse_duration

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("-i", "--interactive", is_flag=True, help="Keep stdin open."),
    click.option("-t", "--tty", is_flag=True, help="Give it a terminal."),
    click.option("--rm", "remove", is_flag=True, help="Remove the machine when its command has ended."),
    click.option("--name", default="", help="Name of the machine."),
    click.option("--key", default="", help="The same key again is the same machine, also after a lost answer."),
    click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Environment of the command."),
    click.option("--env-file", multiple=True, metavar="FILE", help="Environment from a file."),
    click.option("-w", "--workdir", default="", help="Working folder; default: the image's."),
    click.option("-u", "--user", default="", help="User, or uid[:gid]; default: the image's."),
    click.option("--entrypoint", default=None, help='Instead of the image\'s entrypoint and command; "": none.'),
    click.option("-m", "--memory", default="512M", help="Memory."),
    click.option("--cpus", default=1, help="Virtual CPUs."),
    click.option("--driver", default="", help="What it runs on: qemu, gvisor, ...; default: the node's choice."),
    click.option("--disk", default="4G", help="Size of the writable disk."),
    click.option(
        "-v", "--volume", "volume", multiple=True, metavar="HOST:GUEST[:ro]", help="A folder of the host, or a volume by its name."
    ),
    click.option("--mount", multiple=True, metavar="KEY=VALUE,...", help="The same: type, source, target, readonly, size."),
    click.option("-p", "--publish", multiple=True, metavar="[IP:][HOST:]GUEST", help="Publish a port on 127.0.0.1, or a Unix socket by its path."),
    click.option("--socket", multiple=True, metavar="HOST:GUEST", help="Let it use a Unix socket of the host; -v does, too."),
    click.option(
        "--net", "--network", "network", default="broker", type=click.Choice(["broker", "none", "full"]), help="Network."
    ),
    click.option("--allow", multiple=True, metavar="HOST", help="Let it reach a host, *.domain, cidr or host:port."),
    click.option("--route", multiple=True, metavar="NAME=URL", help="A base-URL route of the broker."),
    click.option(
        "--secret", multiple=True, metavar="NAME@HOST", help="Use a secret towards a host; the machine holds a placeholder."
    ),
    click.option(
        "--pull", default="missing", type=click.Choice(["missing", "always", "never"]), help="When to ask the registry."
    ),
    click.option("-l", "--label", multiple=True, metavar="NAME[=VALUE]", help="Label."),
    click.option("--init", is_flag=True, help="Docker's; every machine has an init that reaps."),
    click.option("--privileged", is_flag=True, help="Docker's; every machine has a kernel of its own."),
    click.option("--idle", default="0", metavar="TIME", help="Suspend it when nobody used it for so long; use wakes it."),
    click.option(
        "--restart", default="no", metavar="POLICY",
        help="Start the command again when it ends: no, on-failure[:TIMES], always, unless-stopped.",
    ),
)  # fmt: skip


def machine_flags(function: F) -> F:
    """Give a verb the flags of a new machine."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def parse_labels(items: tuple[str, ...]) -> dict[str, str]:
    """Return Docker's -l: NAME alone is an empty label."""
    return parse_pairs(tuple(item if "=" in item else f"{item}=" for item in items), "--label")


def spec_of(image: str, command: tuple[str, ...], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the machine spec, as the API takes it; what was not said is left to the image."""
    restart = "" if flags["restart"] == "no" else flags["restart"]
    volumes, sockets = split_sockets(list(map(parse_volume, flags["volume"])))
    return {
        "image": image,
        "driver": flags["driver"],
        "argv": list(command),
        "entrypoint": flags["entrypoint"],
        "memory_bytes": flags["memory"],
        "disk_bytes": flags["disk"],
        "cpus": flags["cpus"],
        "env": parse_env(flags["env"], flags["env_file"], callers_env()),
        "cwd": flags["workdir"] or None,
        "user": flags["user"] or None,
        "tty": flags["tty"],
        "stdin": flags["interactive"],
        "remove_on_exit": flags["remove"],
        "network": flags["network"],
        "allow": list(flags["allow"]),
        "routes": parse_pairs(flags["route"], "--route"),
        "ports": [list(parse_port(p)) for p in flags["publish"]],
        "labels": parse_labels(flags["label"]),
        "restart": restart,
        "idle_s": parse_duration(flags["idle"]),
        "secrets": list(flags["secret"]),
        "volumes": [*volumes, *map(parse_mount, flags["mount"])],
        "sockets": [*sockets, *map(parse_socket, flags["socket"])],
    }
