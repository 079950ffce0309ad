"""Templates: an image booted once, pre-warmed, frozen and kept; every machine of that image and size is its fork.

A template is a snapshot (manifest, layers, a row that keeps it alive) plus three files in shared memory that forks
map: RAM, disk, device state. The files are a cache. After a host reboot, or when somebody deleted them, they are
rebuilt byte for byte from the store; the store's hashes make a silently different template impossible.

Publish order: files in a temporary folder -> snapshot in the store -> folder renamed to the manifest's id -> row. A crash
leaves a folder or blobs that nothing names, which the next start removes and the garbage collector sweeps.
Two builders of one template wait for each other (a lock per key; another server on this home is shut out by its lock).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recess.catalog.templates import TemplateRecord
from recess.crashpoints import crash_point
from recess.errors import Corrupt, NotFound, RecessError
from recess.ids import new_id
from recess.machines import warmup
from recess.machines.contract import DISK_NAME, BootFiles, Fingerprint, TemplateRef, VmSpec
from recess.machines.identity import make_thaw, new_token
from recess.machines.mapped import DISK, MEMORY, MappedTemplate, file_part
from recess.machines.parts import Parts
from recess.snapshots.contract import PageSource, SnapshotMeta
from recess.units import format_duration

_FILES = ("ram", "disk", "vmstate")
KEEP_CACHES = 3
"""How many templates' files stay in shared memory although no machine of theirs runs: some 100 MB each."""

TOUCH_S = 60.0
HANDED_S = 60.0  # a template that was handed out so lately may be about to be forked: no machine shows it yet


@dataclass(frozen=True)
class Template:
    """A template that is ready to fork. `pages` maps its files; `sources` are the blocks its snapshots may refer to.

    A VM that was booted cold stands on none: `bare_template` says its spec and sources all the same.
    """

    id: str  # manifest id; "" for none
    ref: TemplateRef | None
    spec: VmSpec
    pages: MappedTemplate | None
    sources: list[PageSource]
    vmstate: bytes


def bare_template(spec: VmSpec, sources: list[PageSource]) -> Template:
    """Return what a VM without a template stands on."""
    return Template("", None, spec, None, sources, b"")


def fingerprint_json(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return a fingerprint as the JSON data that manifests hold."""
    return {**asdict(fingerprint), "cpu_flags": list(fingerprint.cpu_flags)}


def vm_json(spec: VmSpec) -> dict[str, Any]:
    """Return what a manifest says of the VM: sizes, and the files by hash (paths are a node's own business)."""
    return {
        "memory_bytes": spec.memory_bytes, "cpus": spec.cpus, "disk_bytes": spec.disk_bytes, "network": spec.network,
        "root": spec.boot.root_hash, "kernel": spec.boot.kernel_hash, "initrd": spec.boot.initrd_hash,
        "cmdline_extra": spec.boot.cmdline_extra,
    }  # fmt: skip


def vm_from_json(data: Mapping[str, Any], boot: BootFiles) -> VmSpec:
    """Return the VM spec of a manifest (`manifest_vm`) with this node's files. Raises Corrupt."""
    try:
        return VmSpec(
            int(data["memory_bytes"]), int(data["cpus"]), int(data["disk_bytes"]),
            replace(boot, cmdline_extra=str(data["cmdline_extra"])), str(data["network"]), str(data.get("driver", "")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as exc:
        raise Corrupt(f"manifest: unreadable VM spec: {exc}") from exc


def template_key(spec: VmSpec, fingerprint: Fingerprint) -> str:
    """Return the key that tells one template from another: everything that shapes its memory, disk and devices."""
    network = "full" if spec.network == "full" else "serial"  # broker and none differ only above the machine
    shape = vm_json(spec) | {
        "network": network,
        "warm-up": warmup.VERSION,
        "fingerprint": fingerprint_json(fingerprint),
    }
    return hashlib.blake2b(json.dumps(shape, sort_keys=True).encode(), digest_size=16).hexdigest()


class Templates:
    """All templates of a node. Calls may be made at once; equal ones share the work."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._dir = parts.run_dir / "templates"
        self._loaded: dict[str, Template] = {}
        self._handed: dict[str, float] = {}  # by id: when, by the monotonic clock
        self._locks: dict[str, asyncio.Lock] = {}

    def sweep(self) -> None:
        """Remove half-built folders of a server that died. Call before anything else."""
        for folder in self._dir.glob("new-*") if self._dir.is_dir() else ():
            shutil.rmtree(folder, ignore_errors=True)

    async def evict(self, in_use: Collection[str], *, keep: int = KEEP_CACHES) -> int:
        """Drop the files of templates that no machine in `in_use` (template ids) stems from, but for the `keep` used last and
        those handed out just now; they are rebuilt when they are asked for. Returns how many went."""
        (
            found,
            _,
        ) = await self._parts.catalog.templates.survey()  # these files are a cache: a damaged row costs a rebuild
        rows = sorted(found, key=lambda row: row.last_used, reverse=True)
        spare = [row.manifest for row in rows if row.manifest not in in_use]
        now = self._parts.clock.monotonic_s()
        self._handed = {i: when for i, when in self._handed.items() if now - when < HANDED_S}
        kept = {self._folder(i).name for i in (*in_use, *spare[:keep], *self._handed)}
        folders = [p for p in self._dir.iterdir() if not p.name.startswith("new-")] if self._dir.is_dir() else []
        gone = [p for p in folders if p.name not in kept]
        for folder in gone:
            self._loaded = {i: t for i, t in self._loaded.items() if self._folder(i).name != folder.name}
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return len(gone)

    async def ensure(self, image: str, spec: VmSpec) -> Template:
        """Return the template for this VM shape, made and announced if there is none yet."""
        key = template_key(spec, await self._parts.driver_of(spec.driver).fingerprint(spec))
        async with self._lock(key):
            try:
                row = await self._parts.catalog.templates.by_key(key)
            except Corrupt as exc:
                self._parts.progress(f"the template of {image} has a damaged row ({exc.message}): making it again")
                row = None
            if row is not None:
                try:
                    template = await self._load(row.manifest, spec)
                    now = self._parts.clock.wall_s()
                    if now - row.last_used > TOUCH_S:
                        await self._parts.catalog.templates.touch(row.id, now=now)
                    return template
                except (NotFound, Corrupt) as exc:
                    self._parts.progress(f"the template of {image} is damaged ({exc.message}): making it again")
            return await self._build(image, key, spec)

    async def by_id(self, template_id: str) -> Template:
        """Return the template that a snapshot names. Raises NotFound, Corrupt."""
        known = self.loaded(template_id)
        if known is not None:
            return known
        manifest = await asyncio.to_thread(self._parts.store.manifest, template_id)
        vm = manifest_vm(manifest)
        boot = await self.boot_files(vm)
        async with self._lock(template_id):
            return await self._load(template_id, vm_from_json(vm, boot))

    async def under(self, template_id: str, vm: object) -> Template:
        """Return what a VM stands on: the template of this id, or with "" none; then `vm` (as `vm_json`) tells the rest.

        Raises NotFound, Corrupt.
        """
        if template_id:
            return await self.by_id(template_id)
        if not isinstance(vm, Mapping):
            raise Corrupt("it names neither a template nor its VM")
        boot = await self.boot_files(vm)
        return bare_template(vm_from_json(vm, boot), await self._parts.images.sources(boot))

    def loaded(self, template_id: str) -> Template | None:
        """Return a template whose files are there and mapped already."""
        known = self._loaded.get(template_id)
        if known is None or not self._cached(template_id, known.spec):
            return None
        self._handed[template_id] = self._parts.clock.monotonic_s()
        return known

    async def boot_files(self, vm: Mapping[str, Any]) -> BootFiles:
        """Return the files that a VM's description (as `vm_json`) names. Raises Corrupt, NotFound."""
        try:
            root, kernel, initrd = (str(vm[name]) for name in ("root", "kernel", "initrd"))
        except KeyError as exc:
            raise Corrupt(f"a VM's description lacks {exc}") from exc
        return await self._parts.images.boot_files_by_hash(root, kernel, initrd)

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _folder(self, template_id: str) -> Path:
        return self._dir / template_id[-32:]  # a unix path is short, and 128 bits are plenty

    def _cached(self, template_id: str, spec: VmSpec) -> bool:
        """Tell whether the files are there, whole as far as their sizes tell (they appear at once, by a rename)."""
        folder = self._folder(template_id)
        try:
            sizes = [(folder / name).stat().st_size for name in _FILES]
        except FileNotFoundError:
            return False
        return sizes[:2] == [spec.memory_bytes, spec.disk_bytes] and sizes[2] > 0

    async def _load(self, template_id: str, spec: VmSpec) -> Template:
        self._handed[template_id] = self._parts.clock.monotonic_s()  # before its files are looked at
        known = self._loaded.get(template_id)
        if known is not None and self._cached(template_id, spec):
            return known
        sources = await self._parts.images.sources(spec.boot)
        if not self._cached(template_id, spec):
            self._parts.progress("rebuilding the template's memory from its layers")
            await asyncio.to_thread(self._rebuild, template_id, sources)
        folder = self._folder(template_id)
        ref = TemplateRef(template_id, folder / "ram", folder / "disk", folder / "vmstate")
        if not self._cached(template_id, spec):
            raise Corrupt(f"template {template_id[:16]}: its parts have not the sizes that its row says")
        template = Template(template_id, ref, spec, MappedTemplate.of(ref), sources, ref.vmstate.read_bytes())
        self._loaded[template_id] = template
        return template

    def _rebuild(self, template_id: str, sources: list[PageSource]) -> None:
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self._folder(template_id)
        shutil.rmtree(target, ignore_errors=True)
        temp = self._dir / f"new-{new_id('tpl')}"
        temp.mkdir(mode=0o700)
        try:
            self._parts.store.materialise(template_id, MEMORY, temp / "ram", sources=sources)
            self._parts.store.materialise(template_id, DISK, temp / "disk", sources=sources)
            (temp / "vmstate").write_bytes(self._parts.store.vmstate(template_id))
            temp.rename(target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)

    async def _build(self, image: str, key: str, spec: VmSpec) -> Template:
        parts = self._parts
        started = parts.clock.monotonic_s()
        parts.progress(f"making the template of {image}: booting it (once per image and machine size)")
        vm_id = new_id("tpl")
        temp = self._dir / f"new-{vm_id}"
        temp.mkdir(parents=True, mode=0o700)
        try:
            ref = await self._boot_and_freeze(vm_id, spec, temp)
            parts.progress("storing the template")
            sources = await parts.images.sources(spec.boot)
            driver = parts.driver_of(spec.driver)
            fingerprint = await driver.fingerprint(spec)
            why_driver = parts.why_driver("" if driver is parts.driver else driver.name)
            meta = SnapshotMeta(
                fingerprint=fingerprint_json(fingerprint),
                spec={"vm": vm_json(spec), "image": image, "template": "", "driver_why": why_driver},
                machine=vm_id, why="template", created=parts.clock.wall_s(),
            )  # fmt: skip
            vmstate = ref.vmstate.read_bytes()
            report = await asyncio.to_thread(
                lambda: parts.store.write(
                    [file_part(MEMORY, ref.ram), file_part(DISK, ref.disk)], vmstate, meta, sources=sources
                )
            )
            crash_point("templates.stored")
            target = self._folder(report.snapshot_id)
            shutil.rmtree(target, ignore_errors=True)
            temp.rename(target)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
            shutil.rmtree(parts.directory(vm_id), ignore_errors=True)
        await parts.catalog.templates.put(
            TemplateRecord(
                id=vm_id,
                image=image,
                spec_key=key,
                manifest=report.snapshot_id,
                created=meta.created,
                last_used=meta.created,
                meta={"vm": vm_json(spec), "new_bytes": report.new_bytes},
            )
        )
        took = format_duration(parts.clock.monotonic_s() - started)
        parts.progress(f"the template of {image} is ready ({took}, {report.new_bytes / 1e6:.1f} MB stored)")
        return await self._load(report.snapshot_id, spec)

    async def _boot_and_freeze(self, vm_id: str, spec: VmSpec, temp: Path) -> TemplateRef:
        """Boot, thaw (guestd serves a booted machine like any other), warm up, freeze, and take the files."""
        parts = self._parts
        directory = parts.directory(vm_id)
        await parts.images.blank_disk(spec.disk_bytes, directory / DISK_NAME)
        vm = await parts.driver_of(spec.driver).boot(vm_id, spec, directory, for_template=True)
        try:
            env = {"RECESS_NETWORK": "none"}
            await vm.link.thaw(replace(make_thaw(vm_id, "t", 0, env, parts.clock.wall_s()), token=new_token(vm_id)))
            await warmup.warm_up(vm.link, parts.progress)
            await vm.link.freeze(sync=True, timeout_s=10.0)
            return await vm.export_template(temp)
        except RecessError as exc:
            exc.details.setdefault("console", vm.console_tail(2000).decode(errors="replace"))
            raise
        finally:
            await vm.kill()


def manifest_vm(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the VM part of a manifest's spec, with the driver it ran under. Raises Corrupt."""
    spec, fingerprint = manifest.get("spec"), manifest.get("fingerprint")
    vm = spec.get("vm") if isinstance(spec, Mapping) else None
    if not isinstance(vm, Mapping):
        raise Corrupt("manifest: it holds no VM spec")
    return {**vm, "driver": str(fingerprint.get("driver", "")) if isinstance(fingerprint, Mapping) else ""}
