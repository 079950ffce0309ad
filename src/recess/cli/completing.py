"""Names of machines, images, snapshots, sessions and volumes for a shell's completion: asked of a server that runs.

Whoever presses Tab waits for this and sees no errors: it never starts a server, wakes nothing, gives up early, and says
nothing when there is nothing to say. Imported only when a shell asks.
"""

from __future__ import annotations

from collections.abc import Mapping

import click
from click.shell_completion import CompletionItem

from recess.config import load_config
from recess.errors import RecessError
from recess.sdk.local_server import transport_for

WAIT_S = 2.0
_MOST = 500

# what -> (call, key of its rows)
_CALLS = {
    "machine": ("/v1/machines", "machines"),
    "image": ("/v1/images", "images"),
    "snapshot": ("/v1/snapshots", "snapshots"),
    "session": ("/v1/sessions", "sessions"),
    "volume": ("/v1/volumes", "volumes"),
}
# Arguments by their own name, and those whose name says nothing by the verb before them.
_BY_NAME = {"machine": "machine", "machines": "machine", "image": "image", "snapshot": "snapshot"}
_BY_VERB = {
    "rmi": "image", "images": "image", "snapshots": "snapshot", "diff": "snapshot", "push": "snapshot",
    "restore": "snapshot", "session": "session", "volume": "volume", "inspect": "machine",
}  # fmt: skip


class Name(click.types.StringParamType):
    """The name of something that is there; any text is taken all the same."""

    def __init__(self, what: str) -> None:
        self._what = what

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so."""
        context = str((ctx.find_root().params or {}).get("context") or "")
        return [CompletionItem(name) for name in names_of(self._what, context) if name.startswith(incomplete)]


class Place(Name):
    """One side of `cp`: a machine's name with its colon, or a file of this host."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the machines that begin so, and have the shell add its files."""
        files = [CompletionItem(incomplete, type="file")]  # first: bash's script forgets what stood before it
        if ":" in incomplete or "/" in incomplete:
            return files
        return files + [CompletionItem(item.value + ":") for item in super().shell_complete(ctx, param, incomplete)]


def names_of(what: str, context: str = "") -> list[str]:
    """Return the names of all of a kind, ids where there are no names; nothing without a server that answers in time."""
    path, key = _CALLS[what]
    try:
        rows = transport_for(load_config(context=context)).call("GET", path, query={"all": 1}, timeout_s=WAIT_S)[key]
    except (RecessError, OSError):
        return []
    return [str(row.get("name") or row.get("id", "")) for row in rows[:_MOST]]


def kind_of(verbs: tuple[str, ...], argument: str) -> str:
    """Return what an argument of a verb names, "" for what nobody can know: `verbs` is the way to it, like (volume, rm). Pure."""
    if argument in _BY_NAME:
        return _BY_NAME[argument]
    two = argument in ("left", "right") and verbs[0] in ("diff", "snapshots")
    known = two or argument in ("ref", "refs", "names") or (argument == "name" and verbs[-1] == "inspect")
    return _BY_VERB.get(verbs[0], "") if known else ""


def teach(command: click.Command, *verbs: str) -> None:
    """Give a verb's arguments, and those of the verbs below it, the names that they may have."""
    below: Mapping[str, click.Command] = command.commands if isinstance(command, click.Group) else {}
    for name, one in below.items():
        teach(one, *verbs, name)
    for param in command.params:
        if not isinstance(param, click.Argument):
            continue
        if verbs == ("cp",):
            param.type = Place("machine")
        elif kind := kind_of(verbs, str(param.name)):
            param.type = Name(kind)
