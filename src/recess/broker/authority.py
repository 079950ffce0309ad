"""The certificate authority of a machine's secrets: whom the guest trusts, so that the broker can speak TLS to it.

One private key a machine lineage, derived from a key of the home (HKDF, RFC 5869) and the authority's id: nothing to
store, nothing to collect, and a fork goes on with what it already trusts. Its certificate may only vouch for the hosts
the machine's secrets are bound to (name constraints, RFC 5280 section 4.2.1.10, critical): even a stolen key opens
nothing else. Private keys never leave the host. This module must know nothing of machines, sockets or secrets' values.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import secrets
import ssl
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from recess.broker.placeholders import Binding
from recess.broker.rules import Address
from recess.errors import Corrupt, OutOfSpace, Refused

KEY_BYTES = 32
LEAF_DAYS = 7
CONTEXTS_MAX = 256
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (FIPS 186-4, D.1.2.3)
_FROM = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
_TO = dt.datetime(2069, 12, 31, tzinfo=dt.UTC)


def new_authority_id() -> str:
    """Return an id for a new machine's authority."""
    return f"ca_{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Authority:
    """One machine lineage's authority: `certificate` (PEM) is public and goes into the guest."""

    id: str
    key: ec.EllipticCurvePrivateKey
    certificate: bytes


class Authorities:
    """Makes authorities and, for each host, the server side of TLS; the home's key is made when first needed."""

    def __init__(self, key_path: Path) -> None:
        self._path = key_path
        self._contexts: OrderedDict[tuple[str, str], tuple[dt.date, ssl.SSLContext]] = OrderedDict()

    def open(self, authority_id: str, bindings: Sequence[Binding]) -> Authority:
        """Return the authority of this id, good for the hosts of these bindings. Raises Corrupt, Refused, OutOfSpace."""
        key = _derive(_home_key(self._path), authority_id)
        return Authority(authority_id, key, _certify(authority_id, key, bindings))

    def server_context(self, authority: Authority, host: str | Address, now_s: float) -> ssl.SSLContext:
        """Return the TLS server context that speaks as `host`, its certificate made today. About 1 ms when new."""
        today = dt.datetime.fromtimestamp(now_s, tz=dt.UTC)
        place = (authority.id, str(host))
        known = self._contexts.get(place)
        if known is not None and known[0] == today.date():
            self._contexts.move_to_end(place)
            return known[1]
        context = _server_context(authority, host, today)
        self._contexts[place] = (today.date(), context)
        while len(self._contexts) > CONTEXTS_MAX:
            self._contexts.popitem(last=False)
        return context


def _home_key(path: Path) -> bytes:
    """Return the home's key, making it once: of two that make it at the same time the first one's link stays."""
    try:
        return _read_key(path)
    except FileNotFoundError:
        pass
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        return _read_key(path)
    except OSError as exc:
        error = OutOfSpace if exc.errno == 28 else Refused
        raise error(f"the authority's key cannot be kept: {exc.strerror}", hint=f"look at {path}") from exc
    finally:
        temporary.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_mode & 0o077:
            raise Refused("the authority's key is open to others", hint=f"chmod 600 {path}")
        raw = file.read(KEY_BYTES + 1)
    if len(raw) != KEY_BYTES:
        raise Corrupt(
            "the authority's key is damaged", hint=f"remove {path}; machines trust a new one at their next start"
        )
    return raw


def _derive(home_key: bytes, authority_id: str) -> ec.EllipticCurvePrivateKey:
    # 48 bytes reduced modulo the order: the bias is below 2^-120 (FIPS 186-4, B.4.1).
    raw = HKDF(hashes.SHA256(), 48, salt=None, info=b"recess authority " + authority_id.encode()).derive(home_key)
    return ec.derive_private_key(int.from_bytes(raw) % (_ORDER - 1) + 1, ec.SECP256R1())


def _name(authority_id: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Recess broker of this machine, {authority_id}")])


def _permitted(bindings: Sequence[Binding]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for rule in (rule for binding in bindings for rule in binding.rules):
        if rule.network is not None:
            names.append(x509.IPAddress(rule.network))
        else:
            names.append(x509.DNSName(rule.host or rule.suffix.removeprefix(".")))
    return list(dict.fromkeys(names))


def _certify(authority_id: str, key: ec.EllipticCurvePrivateKey, bindings: Sequence[Binding]) -> bytes:
    public = key.public_key()
    names = _permitted(bindings)
    # A kind of name that no binding has is shut out whole: constraints bind only the kinds they mention.
    shut: list[x509.GeneralName] = []
    if not any(isinstance(name, x509.DNSName) for name in names):
        shut.append(x509.DNSName(""))
    if not any(isinstance(name, x509.IPAddress) for name in names):
        shut += [x509.IPAddress(ipaddress.ip_network("0.0.0.0/0")), x509.IPAddress(ipaddress.ip_network("::/0"))]
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    built = (
        x509.CertificateBuilder()
        .subject_name(_name(authority_id)).issuer_name(_name(authority_id)).public_key(public)
        .serial_number(int.from_bytes(authority_id.encode()[-16:]) or 1)
        .not_valid_before(_FROM).not_valid_after(_TO)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.NameConstraints(names or None, shut or None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    return built.public_bytes(serialization.Encoding.PEM)


def _server_context(authority: Authority, host: str | Address, now: dt.datetime) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name: x509.GeneralName = x509.DNSName(host) if isinstance(host, str) else x509.IPAddress(host)
    issuer = authority.key.public_key()
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([])).issuer_name(_name(authority.id)).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=LEAF_DAYS))
        .add_extension(x509.SubjectAlternativeName([name]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        .sign(authority.key, hashes.SHA256())
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _load(context, pem + leaf.public_bytes(serialization.Encoding.PEM))
    return context


def _load(context: ssl.SSLContext, pem: bytes) -> None:
    """Hand a key to OpenSSL, which takes only files: one in memory, so that it never lies on a disk."""
    descriptor = os.memfd_create("recess-leaf", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
