"""Images as the API shows them: list, inspect, build, remove; what still needs a root is known here, not in `images`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recess.catalog import Catalog
from recess.config import Config
from recess.images import ImageInfo, ImageStore, kernels
from recess.machines.parts import Progress


class ImageAdmin:
    """The images of a node, off the event loop."""

    def __init__(self, config: Config, catalog: Catalog, progress: Progress) -> None:
        self._dir = config.images_dir
        self.store = ImageStore(config.images_dir)
        self._catalog = catalog
        self._progress = progress

    async def list_all(self) -> list[dict[str, Any]]:
        """Return all images."""
        return [_json(info) for info in await asyncio.to_thread(self.store.list)]

    async def get(self, name: str) -> dict[str, Any]:
        """Return one; NotFound names those there are."""
        return _json(await asyncio.to_thread(self.store.get, name))

    async def create(self, name: str, packages: Sequence[str]) -> dict[str, Any]:
        """Build an image (minutes). Cancelled, it leaves nothing."""
        cancel = threading.Event()
        work = asyncio.create_task(
            asyncio.to_thread(self.store.create, name, tuple(packages), self._progress, cancel=cancel)
        )
        try:
            return _json(await asyncio.shield(work))
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.wait({work})
            raise

    async def remove(self, name: str) -> None:
        """Forget an image; HasDependents while templates or snapshots stand on its root."""
        await asyncio.to_thread(self.store.remove, name, in_use=await self._in_use())

    async def kernel(self, meta: Mapping[str, Any]) -> str:
        """Return one line about the kernel that a machine runs, from its row's notes; "" for one without."""
        digest = str(meta.get("vm", {}).get("kernel", ""))
        return await asyncio.to_thread(kernels.describe, self._dir, digest) if digest else ""

    async def _in_use(self) -> set[str]:
        """Roots that templates stand on; every snapshot stands on a template."""
        rows = await self._catalog.templates.list_all()
        return {str(row.meta.get("vm", {}).get("root", "")) for row in rows}


def _json(info: ImageInfo) -> dict[str, Any]:
    return {**asdict(info), "root_path": str(info.root_path), "packages": list(info.packages)}
