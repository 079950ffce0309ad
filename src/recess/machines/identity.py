"""Who a machine is: its name, hostname, machine id, and the thaw message that tells it so. Fresh on every start.

Two machines must never share random bytes, generation, hostname or machine id: entropy and generation are drawn here
for every single thaw, the rest follows from the machine's own id and name.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping

from recess.guestlink.link import Thaw
from recess.machines.service import MachineSpec
from recess.machines.trust import trust_env

_ADJECTIVES = (
    "amber", "brave", "brisk", "calm", "clever", "cosy", "eager", "fleet", "gentle", "glad", "keen", "lively", "lucid",
    "mellow", "merry", "neat", "nimble", "plucky", "quick", "quiet", "sage", "spry", "stout", "sunny", "tidy", "warm",
)  # fmt: skip
_NOUNS = (
    "alder", "badger", "beaver", "birch", "crane", "curlew", "dove", "egret", "finch", "heron", "ibis", "jay", "kite",
    "lark", "linden", "marten", "newt", "otter", "plover", "raven", "robin", "rowan", "sparrow", "swift", "tern", "wren",
)  # fmt: skip

_PROXY = "http://127.0.0.1:3128"  # guestd's, in every machine
BROKER_ENV = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), _PROXY) | dict.fromkeys(
    ("no_proxy", "NO_PROXY"), "localhost,127.0.0.1"
)
"""How programs are told to call by the broker; guestd sets the same in a machine whose only way out it is."""


def new_name() -> str:
    """Return a readable name; the caller makes sure that it is free (names are unique among living machines)."""
    return f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}-{secrets.token_hex(2)}"


def child_name(parent: str, number: int) -> str:
    """Return the default name of a fork's child."""
    return f"{parent[:100]}-{number}-{secrets.token_hex(2)}"


def hostname_of(name: str) -> str:
    """Return an RFC 1123 hostname made from a machine's name (at most 63 characters)."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:63].strip("-")
    return label or "machine"


def guest_machine_id(machine_id: str) -> str:
    """Return the 32 hex digits for /etc/machine-id: the same for the same machine, whatever it was restored from."""
    return hashlib.blake2b(machine_id.encode(), digest_size=16, person=b"machine-id").hexdigest()


def guest_env(machine_id: str, name: str, session: str, spec: MachineSpec) -> dict[str, str]:
    """Return the default environment of every process in the machine; the user's own entries win."""
    own = {"RECESS_NETWORK": spec.network, "RECESS_MACHINE": machine_id, "RECESS_NAME": name} | trust_env(spec)
    if spec.network == "full" and (spec.secrets or spec.allow):
        own |= BROKER_ENV  # a card goes past the broker, which is what knows secrets and other machines
    if session:
        own["RECESS_SESSION"] = session
    return own | dict(spec.env)


def make_thaw(machine_id: str, name: str, epoch: int, env: Mapping[str, str], wall_s: float) -> Thaw:
    """Return a thaw message with fresh entropy and a generation id that never repeats."""
    return Thaw(
        wall_ns=int(wall_s * 1e9),
        entropy=secrets.token_bytes(32),
        generation=secrets.token_hex(16),
        epoch=epoch,
        hostname=hostname_of(name),
        machine_id=guest_machine_id(machine_id),
        env=dict(env),
    )


_TOKEN = re.compile(r"rcm_(mch_[0-9a-z]{1,40})_[0-9a-f]{48}")


def new_token(machine_id: str) -> str:
    """Return a token that proves to be this machine, for one life of it."""
    return f"rcm_{machine_id}_{secrets.token_hex(24)}"


def machine_of(token: str) -> str:
    """Return the id of the machine that a token speaks of, "" for what is no token."""
    match = _TOKEN.fullmatch(token)
    return match[1] if match else ""


def mark_of(token: str) -> str:
    """Return what a token is known by where it must not be read: a row, a log."""
    return hashlib.blake2b(token.encode(), digest_size=32, person=b"machine-token").hexdigest()
