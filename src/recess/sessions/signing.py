"""Signatures of what comes in from outside and goes out to it, and the root key they hang on. Pure but for `root_key`.

Format: Standard Webhooks 1.0 (standardwebhooks.com): headers `webhook-id`, `webhook-timestamp` (Unix seconds) and
`webhook-signature` (`v1,BASE64` each, several separated by spaces), HMAC-SHA256 over `id.timestamp.body`, secrets written
`whsec_BASE64`. Every secret is derived from the root key by its name, so that nothing is stored that could be read.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from recess.errors import Refused

TOLERANCE_S = 300.0
ID_CHARS_MAX = 128
PREFIX = "whsec_"
KEY_FILE = "root.key"


def root_key(token: str, home: Path) -> bytes:
    """Return the key that all others are derived from: of the server's token, where it has one (the same on every node
    that has it), else of a file in the home, made on first use. Whoever changes the token takes all of them back."""
    if token:
        return derived(token.encode(), "root")
    path = home / KEY_FILE
    try:
        return path.read_bytes()
    except FileNotFoundError:
        beside = path.with_name(f"{KEY_FILE}.{os.getpid()}")
        beside.touch(mode=0o600)
        beside.write_bytes(secrets.token_bytes(32))
        beside.replace(path)
        return path.read_bytes()


def derived(key: bytes, *name: str) -> bytes:
    """Return the key with this name below another: 32 bytes."""
    told = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in ("recess", *name))
    return hmac.new(key, told, hashlib.sha256).digest()


def shown(key: bytes) -> str:
    """Return a secret in its written form."""
    return PREFIX + base64.b64encode(key).decode()


def hook_key(root: bytes, session: str, name: str) -> bytes:
    """Return the key of a session's webhook."""
    return derived(root, "hook", session, name)


def callback_key(root: bytes, session: str) -> bytes:
    """Return the key that signs a session's callbacks."""
    return derived(root, "callback", session)


def signed(key: bytes, ident: str, at_s: float, body: bytes) -> dict[str, str]:
    """Return the headers of a signed message."""
    stamp = str(int(at_s))
    return {"webhook-id": ident, "webhook-timestamp": stamp, "webhook-signature": f"v1,{_mac(key, ident, stamp, body)}"}


def checked(key: bytes, headers: Mapping[str, str], body: bytes, *, now: float) -> str:
    """Return the id of a message that was signed with this key, not longer than five minutes ago or ahead: the id names
    the message for ever, so it is what a repetition is known by. Raises Refused."""
    ident, stamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not 0 < len(ident) <= ID_CHARS_MAX or not ident.isascii() or not ident.isprintable():
        raise Refused("webhook-id: a short word is needed")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12) or abs(now - int(stamp)) > TOLERANCE_S:
        raise Refused(f"webhook-timestamp: within {TOLERANCE_S:.0f} s of now is needed")
    wanted = f"v1,{_mac(key, ident, stamp, body)}".encode()
    given = headers.get("webhook-signature", "").split(" ")[:16]
    if not any(hmac.compare_digest(wanted, one.encode()) for one in given):
        raise Refused("webhook-signature: none of them is of this message by its secret")
    return ident


def _mac(key: bytes, ident: str, stamp: str, body: bytes) -> str:
    return base64.b64encode(hmac.new(key, f"{ident}.{stamp}.".encode() + body, hashlib.sha256).digest()).decode()


def key_of(written: str) -> bytes:
    """Return the key of a written secret. Raises ValueError."""
    try:
        return base64.b64decode(written.removeprefix(PREFIX), validate=True)
    except binascii.Error as exc:
        raise ValueError("not a secret") from exc
