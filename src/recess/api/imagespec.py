"""What an image says about its own start, put under what the user says: entrypoint, command, environment, folder, user.

Docker's rules: a command replaces the image's, behind the image's entrypoint; an entrypoint replaces both; an empty one
takes the image's away. Pure; the image's part has the OCI names (image-spec/config.md): Entrypoint, Cmd, Env, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recess.errors import BadInput

CWD = "/root"  # of root in images that say nothing, ours


def with_image(spec: Mapping[str, Any], config: Mapping[str, Any], shell: Sequence[str] = ()) -> dict[str, Any]:
    """Return the spec (JSON) with the image's settings where it is silent. `shell`: the command of who wants one in an
    image that has none. The spec's own `entrypoint` (null, a string or a list) is resolved and gone. Raises BadInput."""
    out = dict(spec)
    entrypoint, said = _words(out.pop("entrypoint", None), "entrypoint"), out.get("argv")
    command = _words(said, "argv") or []
    if entrypoint is None:
        first, command = _texts(config.get("Entrypoint")), command or _texts(config.get("Cmd"))
    else:
        first = entrypoint
    out["argv"] = [*first, *command] or list(shell)
    out["env"] = {**_pairs(config.get("Env")), **(out.get("env") or {})}
    out["user"] = out.get("user") or config.get("User") or "root"
    own = CWD if not config and out["user"] in ("root", "0") else "/"
    out["cwd"] = out.get("cwd") or config.get("WorkingDir") or own
    return out


def _words(value: Any, name: str) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return [value] if value else []
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise BadInput(f"spec.{name}: expected a list of strings")
    return list(value)


def _texts(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else []


def _pairs(value: Any) -> dict[str, str]:
    """Return an image's Env, a list of NAME=VALUE; what is none is left out."""
    pairs = (word.partition("=") for word in _texts(value))
    return {name: text for name, sep, text in pairs if sep and name}
