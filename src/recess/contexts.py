"""Contexts: other homes and servers by name, in a file of the user's own (0600, since a context may hold a token).

A context is a home on this host or the URL of a server elsewhere. "default" is what there is without any, and cannot be
changed. Every verb of the command line reads it, so it costs nothing to import. It must not know the environment: `recess.config` says where the file is and which context is meant.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from recess.errors import BadInput, Corrupt, NotFound, Unavailable

DEFAULT = "default"
_KEYS = ("home", "url", "token")
_NAME_MAX = 64


@dataclass(frozen=True)
class Place:
    """Where a context leads: `home`, an absolute folder, or `url` with the token that its server asks for."""

    home: str = ""
    url: str = ""
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Book:
    """All contexts, and the one in use ("default": none of them)."""

    current: str = DEFAULT
    places: Mapping[str, Place] = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """Return where a context leads. Raises NotFound."""
        if name == DEFAULT:
            return Place()
        if name not in self.places:
            known = ", ".join([DEFAULT, *sorted(self.places)])
            raise NotFound(f"no such context: {name}", hint=f"there are {known}", kind="context", ref=name)
        return self.places[name]

    def with_place(self, name: str, place: Place) -> Book:
        """Return a book with one more context, or another of the same name. Raises BadInput."""
        letters = name.replace("-", "").replace("_", "").replace(".", "")
        if name == DEFAULT or len(name) > _NAME_MAX or not (letters.isascii() and letters.isalnum()):
            raise BadInput(f"not a context's name: {name[:80]!r}", hint="letters, digits, dots and dashes; not default")
        if bool(place.home) == bool(place.url):
            raise BadInput("a context is a home or a URL", hint="--home PATH, or --url http://HOST:PORT")
        if place.url and not place.url.startswith(("http://", "https://")):
            raise BadInput(f"not a URL: {place.url[:80]!r}", hint="http://HOST:PORT")
        return replace(self, places={**self.places, name: place})

    def using(self, name: str) -> Book:
        """Return a book in which this context is in use. Raises NotFound."""
        self.place(name)
        return replace(self, current=name)

    def without(self, name: str) -> Book:
        """Return a book without a context. Raises NotFound, BadInput for the one that is in use."""
        self.place(name)
        if name in (DEFAULT, self.current):
            raise BadInput(f"context {name} is in use" if name == self.current else "default cannot be removed",
                           hint="recess context use default")  # fmt: skip
        return replace(self, places={k: v for k, v in self.places.items() if k != name})


def load_book(path: Path) -> Book:
    """Return the contexts of a file; none if there is none. Raises Corrupt, Unavailable."""
    try:
        data = json.loads(path.read_text())
        places = {str(name): Place(**{key: str(data["places"][name][key]) for key in _KEYS}) for name in data["places"]}
        return Book(str(data["current"]), places)
    except FileNotFoundError:
        return Book()
    except (ValueError, KeyError, TypeError) as exc:
        raise Corrupt(f"{path}: no contexts can be read from it: {exc!r}", hint="mend it, or remove it") from exc
    except OSError as exc:
        raise Unavailable(f"{path}: {exc.strerror}") from exc


def save_book(path: Path, book: Book) -> None:
    """Write the contexts, by rename. Raises Unavailable."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as out:
            json.dump(asdict(book), out, indent=2)
        temp.rename(path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise Unavailable(f"{path}: {exc.strerror}") from exc
