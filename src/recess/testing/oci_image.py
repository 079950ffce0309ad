"""Makes OCI image layouts of tar archives, for tests: manifests, nested indexes, layers packed as asked."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_TYPE = "application/vnd.oci.image."
Row = dict[str, Any]


class ImageMaker:
    """One layout; `finish` writes its index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs" / "sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes, kind: str) -> Row:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    def manifest(
        self, layers: Sequence[bytes], config: Mapping[str, Any], *, architecture: str = "amd64", packing: str = "gzip",
        name: str = "",
    ) -> Row:  # fmt: skip
        """Return the descriptor of an image of these tar archives."""
        packers: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstd.compress}
        pack = packers[packing]
        rows = [self.blob(pack(layer), f"{_TYPE}layer.v1.tar+{packing}") for layer in layers]
        diffs = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        about = {
            "os": "linux", "architecture": architecture, "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": diffs},
            "history": [{"created_by": "a test"} for _ in layers],  # optional, and yet builders count it
        }  # fmt: skip
        body = {
            "schemaVersion": 2, "mediaType": f"{_TYPE}manifest.v1+json",
            "config": self.blob(json.dumps(about).encode(), f"{_TYPE}config.v1+json"), "layers": rows,
        }  # fmt: skip
        row = self.blob(json.dumps(body).encode(), f"{_TYPE}manifest.v1+json")
        row["platform"] = {"os": "linux", "architecture": architecture}
        return row | ({"annotations": {"org.opencontainers.image.ref.name": name}} if name else {})

    def index(self, rows: Sequence[Row]) -> Row:
        """Return the descriptor of an index of these manifests."""
        body = {"schemaVersion": 2, "mediaType": f"{_TYPE}index.v1+json", "manifests": list(rows)}
        return self.blob(json.dumps(body).encode(), f"{_TYPE}index.v1+json")

    def finish(self, rows: Sequence[Row]) -> None:
        """Write what the layout holds."""
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(rows)}))
