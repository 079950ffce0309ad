"""Which store this node's snapshots are in, and the way to others: the only place that names a remote blob store.

    local:   Store over a folder of the home
    remote:  SharedStore over copies on this disk, over a meter, over retries, over the bucket

Nothing is asked of a bucket here: a node starts, and runs the machines it has, while its store cannot be reached.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recess.blobs import BlobStore, CachingBlobs, LocalBlobs, MeteredBlobs, NearestBlobs, RetryingBlobs
from recess.config import Config
from recess.errors import BadInput, Corrupt
from recess.paging.pagefiles import PageFiles
from recess.snapshots.blobcheck import checked_pieces
from recess.snapshots.keys import id_of
from recess.snapshots.shared import SharedStore
from recess.snapshots.store import Store
from recess.units import GIB

WHOLE_BYTES_MAX = 4 * GIB
"""Larger blobs are read by ranges and never copied whole."""

_HOME_ID = "home-id"


@dataclass(frozen=True)
class Opened:
    """This node's store. `about` tells what moved so far; `drop_copies` empties what lies here of a remote store, and
    returns the bytes."""

    store: Store
    about: Callable[[], dict[str, Any]]
    drop_copies: Callable[[], int] = lambda: 0


def open_store(config: Config) -> Opened:
    """Return the store that the configuration names. Raises BadInput, Unavailable, OutOfSpace."""
    if not config.store:
        local = MeteredBlobs(LocalBlobs(config.blobs_dir))
        store = Store(local, frame_bytes=config.frame_bytes, level=config.zstd_level)
        return Opened(store, lambda: {"where": str(config.blobs_dir), "traffic": asdict(local.traffic)})
    meter = MeteredBlobs(open_blobs(config.store, config))
    cache = CachingBlobs(
        meter,
        LocalBlobs(config.copies_dir),
        checked_pieces,
        max_bytes=config.store_cache_bytes,
        whole_max_bytes=WHOLE_BYTES_MAX,
        kept=lambda key: id_of(key) is not None,  # not image files: they are read once, and unpacked elsewhere
    )
    shared = SharedStore(
        cache, home_id(config.home), cache=cache, frame_bytes=config.frame_bytes, level=config.zstd_level
    )

    def about() -> dict[str, Any]:
        return {"where": config.store, "traffic": asdict(meter.traffic), "copies": asdict(cache.state)}

    return Opened(shared, about, cache.empty)


def open_blobs(address: str, config: Config) -> BlobStore:
    """Return the blob store at an address: a bucket's URL, or an absolute folder. Raises BadInput."""
    if address.startswith("/"):
        return LocalBlobs(Path(address))
    if "://" not in address:
        raise BadInput(f"not the address of a store: {address!r}", hint="s3://BUCKET/PREFIX, or an absolute folder")
    # Here, not above: importing the client costs more than `recess ps` may take, and most homes never need it.
    from recess.blobs.s3 import RemoteSettings, open_bucket

    settings = RemoteSettings(
        config.s3_endpoint,
        config.s3_region,
        config.s3_access_key_id,
        config.s3_secret_access_key,
        config.s3_session_token,
    )
    return RetryingBlobs(open_bucket(address, settings))


def open_for_reading(config: Config) -> BlobStore:
    """Return the node's store for a process that only reads some ranges of it: a copy on this disk where there is one,
    else the bucket itself. It makes no copies and keeps none."""
    if not config.store:
        return LocalBlobs(config.blobs_dir)
    return NearestBlobs(LocalBlobs(config.copies_dir), open_blobs(config.store, config))


def open_page_files(config: Config, free_bytes: Callable[[], int]) -> PageFiles:
    """Return the memories that this node keeps uncompressed; the disk's reserve is left alone."""
    return PageFiles(
        config.pages_dir, max_bytes=config.page_files_bytes, free_bytes=free_bytes,
        reserve_bytes=page_files_reserve(config),
    )  # fmt: skip


def page_files_reserve(config: Config) -> int:
    """Return the bytes that page files leave free: more than the disk's reserve, for guests' disks grow on it, too."""
    return config.disk_reserve_bytes + GIB


def home_id(home: Path) -> str:
    """Return this home's name in shared stores, made at the first call and never changed. Raises Corrupt."""
    path = home / _HOME_ID
    if not path.exists():
        temp = home / f".{_HOME_ID}.{secrets.token_hex(4)}"
        with temp.open("x") as file:
            file.write(secrets.token_hex(8) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a home that forgot its id would never let go of what it refers to
        temp.replace(path)
    found = path.read_text().strip()
    if len(found) != 16 or not all(c in "0123456789abcdef" for c in found):
        raise Corrupt(
            f"{path} does not hold a home's id", hint="it had 16 hexadecimal digits: restore it from a backup"
        )
    return found
