"""Room `snapshots`: layers, page maps and manifests over a blob store. It knows nothing of VMMs, guests or sessions."""

from recess.snapshots.compat import can_restore
from recess.snapshots.contract import (
    Overlay,
    PageSource,
    RawPart,
    SnapshotMeta,
    SnapshotStore,
    TemplatePages,
    WriteReport,
)
from recess.snapshots.store import Store

__all__ = [
    "Overlay",
    "PageSource",
    "RawPart",
    "SnapshotMeta",
    "SnapshotStore",
    "Store",
    "TemplatePages",
    "WriteReport",
    "can_restore",
]
