"""Secrets that are kept elsewhere: a file, the server's environment, the system's keyring, a Vault.

A source is a line of text, "kind:where". Reading may block on a network; callers do it in a thread. The clients of
keyrings and Vaults are optional (`pip install 'recess[secrets]'`) and configured as they always are (Vault's address
and token in the server's environment). This module must know nothing of machines, policies or placeholders.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from recess.errors import BadInput, NotFound, Unavailable

FILE_BYTES_MAX = 64 * 1024
TIMEOUT_S = 10


def check_source(text: str) -> str:
    """Return a source that can be read, as it is kept. Raises BadInput."""
    kind, found, where = text.strip().partition(":")
    if not found or kind not in _READERS or not where or "\n" in where or len(where) > 1000:
        raise BadInput(
            f"not a source of a secret: {text[:80]!r}",
            hint="file:PATH, env:VARIABLE, keyring:SERVICE/USER or vault:MOUNT/PATH#FIELD",
        )
    if kind == "file" and not where.startswith("/"):
        raise BadInput(f"file:{where[:80]}: the server needs a whole path")
    if kind == "keyring" and "/" not in where:
        raise BadInput(f"keyring:{where[:80]}: write keyring:SERVICE/USER")
    if kind == "vault" and ("#" not in where or "/" not in where.partition("#")[0]):
        raise BadInput(f"vault:{where[:80]}: write vault:MOUNT/PATH#FIELD")
    return text.strip()


def read_source(text: str) -> str:
    """Return what a source holds now. Raises NotFound (nothing there), Unavailable (not reached, client not installed)."""
    kind, _, where = text.partition(":")
    return _READERS[kind](where)


def _client(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Unavailable(f"{name} is not installed beside the server", hint="pip install 'recess[secrets]'") from None


def _read_file(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return file.read(FILE_BYTES_MAX).decode("latin-1")
    except FileNotFoundError:
        raise NotFound(f"no such file: {path}", kind="file", ref=path) from None
    except OSError as exc:
        raise Unavailable(f"{path} cannot be read: {exc.strerror}") from exc


def _read_env(name: str, environ: Mapping[str, str] = os.environ) -> str:
    if name not in environ:
        raise NotFound(
            f"the server's environment has no {name}", hint="it is the environment `recess up` was started in"
        )
    return environ[name]


def _read_keyring(where: str) -> str:
    service, _, user = where.rpartition("/")
    try:
        value: Any = _client("keyring").get_password(service, user)
    except Unavailable:
        raise
    except Exception as exc:  # backends raise what they like; a locked or absent keyring is the usual one
        raise Unavailable(f"the keyring cannot be read: {type(exc).__name__}") from exc
    if value is None:
        raise NotFound(f"the keyring holds nothing for {service}/{user}", hint=f"keyring set {service} {user}")
    return str(value)


def _read_vault(where: str) -> str:
    place, _, key = where.partition("#")
    mount, _, path = place.partition("/")
    client = _client("hvac").Client(timeout=TIMEOUT_S)
    try:
        answer = client.secrets.kv.v2.read_secret_version(path=path, mount_point=mount, raise_on_deleted_version=True)
        data: Any = answer["data"]["data"]
    except Exception as exc:  # the client's own, and its HTTP library's; their texts may quote the answer
        raise Unavailable(f"Vault does not give {mount}/{path}: {type(exc).__name__}") from exc
    finally:
        client.adapter.close()
    if not isinstance(data, dict) or key not in data:
        raise NotFound(f"Vault's {mount}/{path} has no field {key}")
    return str(data[key])


_READERS: Mapping[str, Callable[[str], str]] = {
    "file": _read_file, "env": _read_env, "keyring": _read_keyring, "vault": _read_vault,
}  # fmt: skip
