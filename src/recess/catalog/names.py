"""What may be a name, by Docker's rule, for everything a user can name. Pure; it must know no table."""

from __future__ import annotations

import re

from recess.errors import BadInput

NAME_CHARS_MAX = 128
ID_PREFIXES = ("mch", "snp", "lyr", "ses", "ent", "tpl", "nod", "tok")

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_TAGGED = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?")


def check_name(name: str, what: str, *, tagged: bool = False) -> str:
    """Return `name` if it is a legal name for `what` ("machine"); `tagged` also allows "name:tag". Raises BadInput."""
    pattern = _TAGGED if tagged else _NAME
    if len(name) > NAME_CHARS_MAX or pattern.fullmatch(name) is None:
        shape = "NAME or NAME:TAG" if tagged else "NAME"
        raise BadInput(
            f"not a {what} name: {name[:NAME_CHARS_MAX]!r}",
            hint=f"{shape}: 2 to {NAME_CHARS_MAX} letters, digits, '_', '.' or '-', beginning with a letter or digit",
        )
    if name.partition("_")[0] in ID_PREFIXES and "_" in name:
        raise BadInput(f"{name!r} looks like an id and cannot be a {what} name", hint="choose another name")
    return name
