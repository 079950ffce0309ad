"""Secrets, as a machine sees them: placeholders in its environment, and trust in the authority that the broker speaks
for. The values are the broker's alone; nothing here ever holds one.

Images differ in where their programs look for certificates: the certificate is added to every bundle that is there (to
Debian's path if there is none), and the variables that common clients read point to it. Idempotent: a fork and a resume
find it in place.
"""

from __future__ import annotations

from dataclasses import replace

from recess.broker import Policy, build_policy, new_authority_id, parse_bindings, placeholder_of
from recess.errors import NotFound
from recess.guestlink.link import GuestLink
from recess.machines.service import MachineSpec

CERTIFICATE = "/usr/local/share/ca-certificates/recess.crt"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"  # Debian, Ubuntu, Alpine, Arch, Nix
OTHER_BUNDLES = ("/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem")
BUNDLE_BYTES_MAX = 4 << 20
_BUNDLE_VARIABLES = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE", "DENO_CERT",
    "CARGO_HTTP_CAINFO",
)  # fmt: skip

_ANY_PUBLIC = "*:*"


def policy_of(spec: MachineSpec) -> Policy:
    """Return the broker's policy for a machine; one with a network card may go to any public host by the broker, too, since
    it may without. Raises BadInput."""
    allow = (*spec.allow, _ANY_PUBLIC) if spec.network == "full" else spec.allow
    return build_policy(allow, spec.routes, spec.secrets, spec.authority, spec.sockets)


def with_authority(spec: MachineSpec) -> MachineSpec:
    """Return a new machine's spec, checked, with an authority of its own if it holds secrets. Raises BadInput."""
    spec = replace(spec, authority=new_authority_id() if spec.secrets else "")
    policy_of(spec)
    return spec


def trust_env(spec: MachineSpec) -> dict[str, str]:
    """Return the variables that a machine's secrets set: placeholders, and where clients find whom to trust."""
    if not spec.secrets:
        return {}
    held = {binding.name: placeholder_of(binding.name) for binding in parse_bindings(spec.secrets)}
    return dict.fromkeys(_BUNDLE_VARIABLES, BUNDLE) | {"NODE_EXTRA_CA_CERTS": CERTIFICATE} | held


async def trust(link: GuestLink, certificate: bytes) -> None:
    """Make the guest's programs trust the authority; does nothing if they do already or `certificate` is empty.

    Raises OutOfSpace (the guest's disk is full), GuestFailed, BadInput (a bundle is no file of a bundle's size), Timeout.
    """
    if not certificate or await _read(link, CERTIFICATE) == certificate:
        return
    for path in (BUNDLE, *OTHER_BUNDLES):
        bundle = await _read(link, path)
        if bundle is None and path != BUNDLE:
            continue
        # Debian links the other names to the first: what was added there is seen here.
        if certificate not in (bundle or b""):
            joint = b"\n" if bundle and not bundle.endswith(b"\n") else b""
            await link.write_file(path, (bundle or b"") + joint + certificate, 0o644)
    # Last: it says that the others are done.
    await link.write_file(CERTIFICATE, certificate, 0o644)


async def _read(link: GuestLink, path: str) -> bytes | None:
    try:
        return await link.read_file(path, BUNDLE_BYTES_MAX)
    except NotFound:
        return None
