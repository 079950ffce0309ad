"""Docker's `-v` and `--mount` as the API's volumes and sockets. Pure but for the working folder, which relative paths start
from, and a look at whether a path is a socket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recess.errors import BadInput

_FORM = "HOST:GUEST[:ro]"
_TYPES = ("bind", "volume")


def parse_volume(text: str) -> dict[str, Any]:
    """Return "SOURCE:TARGET[:ro|rw]"; a source with a slash, or ".", is a folder of the host, else a name. Raises BadInput."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        hint = "name the volume, too: NAME:/path" if len(parts) == 1 else ""
        raise BadInput(f"-v {text}: expected {_FORM}", hint=hint)
    words = parts[2].split(",") if len(parts) == 3 else []
    unknown = sorted(
        set(words) - {"ro", "rw", "z", "Z"}
    )  # labels of SELinux: nothing is mounted, so nothing is labelled
    if unknown:
        raise BadInput(f"-v {text}: {unknown[0]!r} is none of ro, rw")
    return {"source": source_of(parts[0]), "target": parts[1], "readonly": "ro" in words}


def parse_mount(text: str) -> dict[str, Any]:
    """Return "type=bind,source=.,target=/work,readonly,size=2G". Raises BadInput."""
    found: dict[str, str] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        name = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}.get(name, name)
        if name not in ("type", "source", "target", "readonly", "size"):
            raise BadInput(f"--mount {text}: unknown key {name!r}", hint="type, source, target, readonly, size")
        found[name] = value
    kind, source, target = found.get("type", "volume"), found.get("source", ""), found.get("target", "")
    if kind not in _TYPES or not source or not target:
        raise BadInput(f"--mount {text}: type (bind or volume), source and target are needed")
    if kind == "bind":
        source = str(Path(source).expanduser().absolute())
    elif "/" in source:
        raise BadInput(f"--mount {text}: a volume is called by its name", hint="type=bind for a folder of the host")
    readonly = found.get("readonly", "false").lower() in ("", "true", "1")
    return {"source": source, "target": target, "readonly": readonly, "size_bytes": found.get("size") or None}


def parse_socket(text: str) -> list[str]:
    """Return "HOST:GUEST", a Unix socket of the host and where the machine finds it. Raises BadInput."""
    host, sep, guest = text.partition(":")
    if not sep or not host or not guest.startswith("/") or ":" in guest:
        raise BadInput(f"--socket {text}: expected HOST:GUEST, two paths")
    return [str(Path(host).expanduser().absolute()), guest]


def split_sockets(volumes: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Return the volumes that are folders or files, and those that are Unix sockets, as in `-v /run/docker.sock:/run/d.sock`:
    nothing can be copied of those, and the machine is let to use them."""
    sockets = [v for v in volumes if v["source"].startswith("/") and Path(v["source"]).is_socket()]
    return [v for v in volumes if v not in sockets], [[v["source"], v["target"]] for v in sockets]


def source_of(text: str) -> str:
    """Return a volume's name as it is, a folder as its absolute path."""
    return str(Path(text).expanduser().absolute()) if "/" in text or text in (".", "..", "~") else text
