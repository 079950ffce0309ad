"""Images as the API shows them: list, inspect, pull, import, build, tag, remove; what still needs a root is known here, not in `images`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recess.config import Config
from recess.errors import BadInput, Corrupt, NotFound
from recess.images import ImageInfo, ImageStore, kernels
from recess.images.files import build_dir
from recess.images.layers import ROOT_BYTES_MAX
from recess.images.registry import Sources, with_tag
from recess.machines.parts import Progress
from recess.units import format_bytes

PULL_POLICIES = ("missing", "always", "never")


class ImageAdmin:
    """The images of a node, off the event loop."""

    def __init__(
        self,
        config: Config,
        in_use: Callable[[], Awaitable[set[str]]],
        release: Callable[[str, str], Awaitable[None]],
        progress: Progress,
    ) -> None:
        self._dir = config.images_dir
        self.store = ImageStore(config.images_dir)
        self._in_use = in_use
        self._release = release
        self._progress = progress
        self._sources = Sources(self.store)
        self._pulling = asyncio.Lock()

    async def list_all(self) -> list[dict[str, Any]]:
        """Return all images; one whose metadata is damaged, or whose root is lost, is shown with `damaged` and `hint`."""
        good, damaged = await asyncio.to_thread(self.store.survey)
        return sorted([*map(_json, good), *(_damaged(*one) for one in damaged)], key=lambda one: str(one["name"]))

    async def get(self, name: str) -> dict[str, Any]:
        """Return one; NotFound names those there are."""
        return _json(await asyncio.to_thread(self.store.get, name))

    async def config(self, name: str) -> Mapping[str, Any]:
        """Return how an image wants to be started, in the OCI's words; {} for one that does not say. That there is such an
        image is not said: the driver may have its own."""
        with contextlib.suppress(NotFound):
            return (await asyncio.to_thread(self.store.get, name)).config
        return {}

    async def create(self, name: str, packages: Sequence[str]) -> dict[str, Any]:
        """Build an image (minutes). Cancelled, it leaves nothing."""
        return await self._long(lambda cancel: self.store.create(name, tuple(packages), self._progress, cancel=cancel))

    async def pull(self, reference: str, *, name: str = "", insecure: bool = False) -> dict[str, Any]:
        """Take an image from a registry; see `recess.images.registry.Sources`. Cancelled, it leaves nothing."""
        async with self._pulling:  # two who want the same would fetch it twice
            return await self._long(
                lambda cancel: self._sources.pull(
                    reference, self._progress, name=name, insecure=insecure, cancel=cancel
                )
            )

    async def ensure(self, name: str, policy: str) -> None:
        """Pull an image that is not here (`missing`), in any case (`always`), or not at all (`never`). A bare word is
        never looked for elsewhere: it may be misspelled, and nobody should get a stranger's image for that."""
        if policy not in PULL_POLICIES:
            raise BadInput(f"pull: unknown policy {policy[:40]!r}", hint=", ".join(PULL_POLICIES))
        elsewhere = any(mark in name for mark in ":/@")
        if policy == "never" or not elsewhere:
            return
        if policy == "missing":
            with contextlib.suppress(NotFound):
                await asyncio.to_thread(self.store.get, name)
                return
        await self.pull(name)

    async def take_in(self, source: str, name: str) -> dict[str, Any]:
        """Take an image from a file or folder of this host. Cancelled, it leaves nothing."""
        path = _here(source)
        return await self._long(lambda cancel: self._sources.take_in(path, name, self._progress, cancel=cancel))

    async def build(
        self, context: str, dockerfile: str, name: str, arguments: Sequence[str], *, target: str = ""
    ) -> dict[str, Any]:
        """Build a Dockerfile, or one stage of it. Cancelled, it leaves nothing."""
        folder, file = _here(context), _here(dockerfile)
        return await self._long(
            lambda cancel: self._sources.build(
                folder, file, name, self._progress, arguments=tuple(arguments), target=target, cancel=cancel
            )
        )

    async def commit(self, archive: AsyncIterator[bytes], name: str, *, image: str) -> dict[str, Any]:
        """Make an image of a machine's files; it starts as the `image` does that the machine was made from."""
        config = await self.config(image)
        wanted = with_tag(name)
        with build_dir(self._dir) as work:
            path = work / "root.tar"
            with path.open("wb") as out:
                async for piece in archive:
                    if out.tell() + len(piece) > ROOT_BYTES_MAX:
                        raise BadInput(f"the machine holds more than {format_bytes(ROOT_BYTES_MAX)}")
                    await asyncio.to_thread(out.write, piece)
            return await self._long(
                lambda cancel: self._sources.take_in(path, wanted, self._progress, config=config, cancel=cancel)
            )

    async def tag(self, name: str, further: str) -> dict[str, Any]:
        """Give an image a further name."""
        return _json(await asyncio.to_thread(self.store.tag, name, with_tag(further)))

    async def _long(self, call: Callable[[threading.Event], ImageInfo]) -> dict[str, Any]:
        cancel = threading.Event()
        work = asyncio.create_task(asyncio.to_thread(call, cancel))
        try:
            return _json(await asyncio.shield(work))
        except asyncio.CancelledError:
            cancel.set()
            await asyncio.wait({work})
            raise

    async def remove(self, name: str) -> None:
        """Forget an image and the templates that are kept for its sake alone; HasDependents while machines or snapshots stand
        on its root. Raises Corrupt when that cannot be told."""
        await self._release(name, await asyncio.to_thread(self.store.only_name_of, name))
        await asyncio.to_thread(self.store.remove, name, in_use=await self._in_use())

    async def used(self) -> set[str]:
        """Return the root hashes that templates, machines or snapshots stand on. Raises Corrupt when that cannot be told."""
        return await self._in_use()

    async def kernel(self, meta: Mapping[str, Any]) -> str:
        """Return one line about the kernel that a machine runs, from its row's notes; "" for one without."""
        digest = str(meta.get("vm", {}).get("kernel", ""))
        return await asyncio.to_thread(kernels.describe, self._dir, digest) if digest else ""


def _here(path: str) -> Path:
    if not path.startswith("/"):
        raise BadInput(f"{path[:80]!r}: an absolute path on the server's host is needed")
    return Path(path)


def _damaged(name: str, error: Corrupt) -> dict[str, Any]:
    empty = {"root_hash": "", "root_path": "", "packages": [], "size_bytes": 0, "created": 0.0}
    return {"name": name, **empty, "damaged": error.message, "hint": error.hint}


def _json(info: ImageInfo) -> dict[str, Any]:
    return {**asdict(info), "root_path": str(info.root_path), "packages": list(info.packages)}
