"""What this process still knows of snapshots it wrote, so that the next one need not read it back: page maps, which node
is in which pack, and a fingerprint of each page of a layer.

It saves time and is never the only source: what is forgotten, or was written by another process, is read from the store.
Nothing that is remembered is believed about bytes: a fingerprint only proposes what is then compared byte for byte, and
whoever refers to a file by what is remembered looks whether that is still there (`parent`). Bounded, oldest use first out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from recess.snapshots.manifest_v1 import FileV1
from recess.snapshots.pagemap import PageMap
from recess.units import MIB

_MAPS_BYTES, _PRINTS_BYTES = 32 * MIB, 32 * MIB  # 2.8 million pages of page maps, 4 million of layers
_HASH_BYTES = 100  # of a hash in a dict, Python's part counted


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)


@dataclass(frozen=True)
class Written:
    """One snapshot's page maps and layers. `leaves`: by part, the hash of each leaf by its number; `packs`: by id, the nodes in use."""

    maps: Mapping[str, PageMap]
    leaves: Mapping[str, Mapping[int, bytes]]
    packs: Mapping[str, frozenset[bytes]]
    layers: Sequence[FileV1] = ()

    @property
    def nbytes(self) -> int:
        """About how much memory this takes."""
        hashes = sum(len(known) for known in (*self.leaves.values(), *self.packs.values()))
        return sum(12 * page_map.count for page_map in self.maps.values()) + _HASH_BYTES * hashes


class Recall:
    """The memory of one store. Safe to use from several threads."""

    def __init__(self, *, maps_bytes: int = _MAPS_BYTES, prints_bytes: int = _PRINTS_BYTES) -> None:
        self._snapshots: _Newest[Written] = _Newest(maps_bytes)
        self._prints: _Newest[NDArray[np.uint64]] = _Newest(prints_bytes)

    def written(self, snapshot_id: str) -> Written | None:
        """Return what is known of a snapshot."""
        return self._snapshots.get(snapshot_id)

    def note_snapshot(self, snapshot_id: str, written: Written) -> None:
        """Remember a snapshot that is durable."""
        self._snapshots.put(snapshot_id, written)

    def prints(self, layer_id: str) -> NDArray[np.uint64] | None:
        """Return the fingerprint of each page of a layer, by slot (`classify.fingerprints`)."""
        return self._prints.get(layer_id)

    def note_layer(self, layer_id: str, prints: NDArray[np.uint64]) -> None:
        """Remember the pages of a layer."""
        self._prints.put(layer_id, prints)


class _Newest(Generic[T]):
    """Values by id up to a size, those that were not used for longest forgotten first; one over the size not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._values: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ref: str) -> T | None:
        with self._lock:
            if ref in self._values:
                self._values.move_to_end(ref)
            return self._values.get(ref)

    def put(self, ref: str, value: T) -> None:
        with self._lock:
            old = self._values.pop(ref, None)
            self._bytes -= old.nbytes if old is not None else 0
            if value.nbytes > self._max_bytes:
                return
            self._values[ref] = value
            self._bytes += value.nbytes
            while self._bytes > self._max_bytes:
                _, gone = self._values.popitem(last=False)
                self._bytes -= gone.nbytes
