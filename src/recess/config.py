"""The only reader of the environment and of configuration files; everybody else gets a frozen `Config`.

Precedence: explicit argument, environment, `$RECESS_HOME/config.toml`, default. Unknown keys in the file are an error.

Files below the home (all private to the user, mode 0700):
    recess.db            SQLite: log, catalog            blobs/     layers, page maps, manifests, log blobs
    home-id              this home's name in shared stores   copies/  a remote store's blobs, bounded
    pages/               memories of snapshots, uncompressed, bounded, to be mapped in place
    packed/              layers of the last day's exports
    images/              roots, kernels, initrds         machines/  one folder a machine: writable disk, console
    server.log  server.lock  server.sock -> run_dir      logs/
Files below the run directory (shared memory, gone after a host reboot, rebuildable): template RAM caches, sockets,
journals of running VMMs.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from recess.contexts import DEFAULT, Place, load_book
from recess.errors import BadInput

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """Where things are and how the node behaves. Durations in seconds, sizes in bytes."""

    home: Path
    run_dir: Path
    url: str = ""  # empty: the local server's unix socket
    token: str = ""
    driver: str = "auto"
    qemu_bin: str = ""  # empty: qemu-system-x86_64 from PATH
    accelerator: str = "auto"  # auto | kvm | tcg
    runsc_bin: str = ""  # empty: runsc from PATH
    firecracker_bin: str = ""  # empty: firecracker from PATH, or from the home's bin
    kernel: str = "auto"  # auto (trimmed if built, else Debian's) | trimmed | debian | path of a kernel file
    lazy_memory: str = "auto"  # auto | remap | lazy | inject: how memory is brought back (recess.paging.choice)
    page_files_bytes: int = 4 << 30  # memories of snapshots kept uncompressed on this disk, to be mapped; 0: none
    page_tracking: str = "auto"  # auto | user (a userfaultfd without rights) | private (no exact tracking)
    vmm_limits: str = (
        "auto"  # auto (a control group for each QEMU and gVisor machine where this user may make some) | off
    )
    network_cards: str = "public"  # public | open | off: what --net full reaches (docs/egress.md)
    warm_pool_max: int = 4  # VMs kept started for the next restores, at most (docs/internals/warm-pool.md); 0: none
    bin_dir: Path = _PACKAGE / "_bin"  # guestd and keeper
    agent_dir: Path = _PACKAGE / "_agent"  # holds recess_agent/
    idle_timeout_s: float = 30.0
    lease_s: float = 15.0
    zstd_level: int = 1
    frame_bytes: int = 65536
    drop_caches: str = (
        "off"  # off | always | how long idle: a guest put away gives up its page cache (machines.emptying)
    )
    recompress_after_s: float = 86400.0  # layers that no younger snapshot names are compressed once more; 0: never
    recompress_level: int = 19
    recompress_frame_bytes: int = 262144  # what a page fault in such a layer must decode
    recompress_budget_s: float = 300.0  # a round, hourly, begins no layer after that; it runs at the lowest priority
    export_level: int = 17  # of an archive's layers, that are packed once more when it is made
    export_frame_bytes: int = 2 << 20
    snapshot_keep: int = 3  # newest automatic snapshots that stay of each session or machine
    snapshot_retention_s: float = 86400.0  # younger ones stay too: what a fork or a rewind may want
    snapshot_quota_bytes: int = 0  # 0: none
    snapshot_check_every_s: float = 86400.0  # one stored snapshot is restored for real that often; 0: never
    disk_reserve_bytes: int = 256 << 20  # below that nothing is stored any more
    database_url: str = field(default="", repr=False)  # empty: SQLite in the home; else postgresql://...
    store: str = ""  # empty: the folder `blobs` of the home; else s3://BUCKET/PREFIX, gs://, az://
    store_cache_bytes: int = 10 << 30  # copies of remote blobs on this disk, at most
    remote: str = ""  # where `recess snapshots push` and `pull` go by default: as `store`, or an absolute folder
    s3_endpoint: str = ""  # empty: the provider's own
    s3_region: str = ""
    s3_access_key_id: str = field(default="", repr=False)
    s3_secret_access_key: str = field(default="", repr=False)
    s3_session_token: str = field(default="", repr=False)
    traces_endpoint: str = ""  # an OpenTelemetry collector; empty: no traces (docs/observability.md)
    json_logs: bool = False
    no_color: bool = False
    context: str = ""  # the context that was chosen, if any
    crash_point: str = ""  # tests only: the named point at which this process kills itself

    @property
    def database_path(self) -> Path:
        """The SQLite file."""
        return self.home / "recess.db"

    @property
    def blobs_dir(self) -> Path:
        """The local blob store's folder."""
        return self.home / "blobs"

    @property
    def copies_dir(self) -> Path:
        """Copies of a remote store's blobs."""
        return self.home / "copies"

    @property
    def pages_dir(self) -> Path:
        """Memories of snapshots, uncompressed."""
        return self.home / "pages"

    @property
    def packed_dir(self) -> Path:
        """Layers packed for exports: for a day."""
        return self.home / "packed"

    @property
    def images_dir(self) -> Path:
        """Roots, kernels and initrds."""
        return self.home / "images"

    @property
    def machines_dir(self) -> Path:
        """One folder a machine: its writable disk and console log."""
        return self.home / "machines"

    @property
    def socket_path(self) -> Path:
        """The local server's unix socket (short: a unix path holds 107 bytes)."""
        return self.run_dir / "server.sock"


_ENV = {
    "url": "RECESS_URL",
    "token": "RECESS_TOKEN",
    "driver": "RECESS_DRIVER",
    "qemu_bin": "RECESS_QEMU_BIN",
    "accelerator": "RECESS_ACCELERATOR",
    "runsc_bin": "RECESS_RUNSC_BIN",
    "firecracker_bin": "RECESS_FIRECRACKER_BIN",
    "kernel": "RECESS_KERNEL",
    "lazy_memory": "RECESS_LAZY_MEMORY",
    "page_files_bytes": "RECESS_PAGE_FILES_BYTES",
    "page_tracking": "RECESS_PAGE_TRACKING",
    "vmm_limits": "RECESS_VMM_LIMITS",
    "network_cards": "RECESS_NETWORK_CARDS",
    "warm_pool_max": "RECESS_WARM_POOL_MAX",
    "bin_dir": "RECESS_BIN_DIR",
    "agent_dir": "RECESS_AGENT_DIR",
    "idle_timeout_s": "RECESS_IDLE_TIMEOUT_S",
    "lease_s": "RECESS_LEASE_S",
    "zstd_level": "RECESS_ZSTD_LEVEL",
    "frame_bytes": "RECESS_FRAME_BYTES",
    "drop_caches": "RECESS_DROP_CACHES",
    "recompress_after_s": "RECESS_RECOMPRESS_AFTER_S",
    "recompress_level": "RECESS_RECOMPRESS_LEVEL",
    "recompress_frame_bytes": "RECESS_RECOMPRESS_FRAME_BYTES",
    "recompress_budget_s": "RECESS_RECOMPRESS_BUDGET_S",
    "export_level": "RECESS_EXPORT_LEVEL",
    "export_frame_bytes": "RECESS_EXPORT_FRAME_BYTES",
    "crash_point": "RECESS_CRASH_POINT",
    "run_dir": "RECESS_RUN_DIR",
    "database_url": "RECESS_DATABASE_URL",
    "store": "RECESS_STORE",
    "store_cache_bytes": "RECESS_STORE_CACHE_BYTES",
    "remote": "RECESS_REMOTE",
    "s3_endpoint": "AWS_ENDPOINT_URL_S3",
    "s3_region": "AWS_REGION",
    "s3_access_key_id": "AWS_ACCESS_KEY_ID",
    "s3_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "s3_session_token": "AWS_SESSION_TOKEN",
    "traces_endpoint": "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
}

# The usual second names: read where the first is not set.
_ENV_TOO = {
    "s3_endpoint": "AWS_ENDPOINT_URL",
    "s3_region": "AWS_DEFAULT_REGION",
    "traces_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT",
}


def _default_home(env: Mapping[str, str]) -> Path:
    if env.get("RECESS_HOME"):
        return Path(env["RECESS_HOME"]).expanduser().absolute()
    data = env.get("XDG_DATA_HOME") or str(Path(env.get("HOME", "/root")) / ".local" / "share")
    return Path(data) / "recess"


def _default_run_dir(home: Path) -> Path:
    tag = hashlib.blake2b(str(home).encode(), digest_size=4).hexdigest()
    base = Path("/dev/shm")
    if not (base.is_dir() and os.access(base, os.W_OK)):
        base = Path("/tmp")
    return base / f"recess-{os.getuid()}-{tag}"


def _coerce(name: str, kind: str, value: object) -> object:
    try:
        if kind == "Path":
            return Path(str(value)).expanduser().absolute()
        if kind == "float":
            return float(str(value))
        if kind == "int":
            return int(str(value))
        if kind == "bool":
            return str(value).lower() in ("1", "true", "yes", "on")
    except ValueError as exc:
        raise BadInput(f"configuration: {name} is not a {kind}: {value!r}") from exc
    return str(value)


def contexts_path(env: Mapping[str, str] | None = None) -> Path | None:
    """Return the user's file of contexts; None without a place for it."""
    environ = os.environ if env is None else env
    base = environ.get("XDG_CONFIG_HOME") or (environ.get("HOME") and str(Path(environ["HOME"]) / ".config"))
    return Path(base) / "recess" / "contexts.json" if base else None


def _chosen_place(environ: Mapping[str, str], overrides: Mapping[str, object], asked: str) -> tuple[str, Place]:
    """Return the context that is meant and where it leads. One that was named wins over everything; the one in use, or
    in the environment, gives way to whoever says a home or a URL."""
    said = bool(overrides.keys() & {"home", "url"} or environ.get("RECESS_HOME") or environ.get("RECESS_URL"))
    name, path = asked or environ.get("RECESS_CONTEXT", ""), contexts_path(environ)
    if path is None or (said and not asked) or (not name and not path.exists()):
        return "", Place()
    book = load_book(path)
    name = name or book.current
    return name, book.place(name)


def load_config(env: Mapping[str, str] | None = None, **overrides: object) -> Config:
    """Return the effective configuration; `context` names one (default: the environment's, or the one in use). Raises
    BadInput for an unknown key or a value of the wrong type, NotFound for an unknown context."""
    environ = os.environ if env is None else env
    name, place = _chosen_place(environ, overrides, str(overrides.pop("context", "")))
    home = _default_home(environ)
    if "home" in overrides:
        home = Path(str(overrides.pop("home"))).absolute()
    elif place.home:
        home = Path(place.home)
    config = Config(home=home, run_dir=_default_run_dir(home), no_color=bool(environ.get("NO_COLOR")))
    kinds = {f.name: str(f.type) for f in fields(Config)}
    values: dict[str, object] = {}
    file = home / "config.toml"
    if file.is_file():
        try:
            values.update(tomllib.loads(file.read_text()))
        except (ValueError, OSError) as exc:  # no TOML, no text, or not to be read
            raise BadInput(f"configuration: {file}: {exc}") from exc
        if "home" in values:
            raise BadInput(f"configuration: {file}: a home cannot name another one", hint="set RECESS_HOME")
    for names in (_ENV_TOO, _ENV):
        values.update({name: environ[var] for name, var in names.items() if environ.get(var)})
    if name and name != DEFAULT:
        values |= {"url": place.url, "token": place.token} if place.url else {"url": ""}
    values.update(overrides, context=name)
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise BadInput(f"configuration: unknown key {unknown[0]!r}", hint=f"known keys: {', '.join(sorted(kinds))}")
    coerced: dict[str, Any] = {name: _coerce(name, kinds[name], value) for name, value in values.items()}
    return replace(config, **coerced)
