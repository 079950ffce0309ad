"""The composition root of an embedded node: everything that is one process, one home and one user.

It builds the rooms from the bottom up, hands each what it needs, and takes over what an earlier server left. It is the
only importer of concrete drivers, blob stores and databases. What it must not hold is a decision: those are below.

Start: lock on the home -> database (migrated) -> store, driver, broker -> machines adopted -> sessions recovered.
A start that fails at any step closes what was opened, in reverse. End: `close(detach=True)` lets machines run on under
their keepers for the next server; `detach=False` puts sessions and machines away first. A server that is killed
skips all of this, and the next start does the same work from rows and journals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from recess.broker import Authorities, Broker, SecretStore
from recess.catalog import Catalog
from recess.clock import Clock, SystemClock
from recess.config import Config
from recess.contextlog import LogKeeper, SqlLog
from recess.crashpoints import arm_from_config
from recess.errors import OutOfSpace, Refused, Unavailable
from recess.frames.pool import take_short_turns
from recess.machines.athand import AtHand
from recess.machines.emptying import parse_policy
from recess.machines.manager import Manager
from recess.machines.parts import Parts, Progress
from recess.machines.retention import Keeping
from recess.machines.roots import release_root, roots_in_use
from recess.node.doctoring import run_doctor
from recess.node.drivers import Chosen, choose_drivers, make_images
from recess.node.gate import NodeGate
from recess.node.imageadmin import ImageAdmin
from recess.node.lock import HomeLock
from recess.node.logs import keep_log, node_name, open_database, open_log
from recess.node.orphans import claim_run_dir, remove_orphans
from recess.node.pagers import Pagers
from recess.node.reaper import reap
from recess.node.stores import Opened, open_page_files, open_store
from recess.node.telemetry import open_traces
from recess.node.transfers import Transfers
from recess.node.usage import allotted_bytes, usage
from recess.paging.choice import LAZY_BYTES_MIN
from recess.plain import Backends, PlainMachines
from recess.sessions.callbacks import Callbacks
from recess.sessions.counters import Counters
from recess.sessions.deps import Deps, Settings
from recess.sessions.observing import Observers
from recess.sessions.service import Sessions
from recess.sessions.signing import root_key
from recess.snapshots.recompression import Recompression
from recess.units import PAGE_BYTES
from recess.volumes import NamedVolumes


async def open_sessions(
    config: Config, catalog: Catalog, log: SqlLog, machines: Manager, clock: Clock, stack: contextlib.AsyncExitStack
) -> tuple[Sessions, Counters, PlainMachines]:  # fmt: skip
    """Return the sessions over machines and plain processes, what counts their doings, and the plain machines themselves."""
    settings = Settings(
        owner=node_name(config) or f"local:{os.getpid()}", embedded=not config.database_url,
        agent_package=config.agent_dir, lease_s=config.lease_s, idle_timeout_s=config.idle_timeout_s,
    )  # fmt: skip
    plain = await asyncio.to_thread(PlainMachines, config.home / "plain", config.run_dir / "p", clock)
    stack.push_async_callback(plain.close)
    counters, observers = watch_sessions(config, settings.owner, stack)
    deps = Deps(
        log=log, machines=Backends(machines, plain), agents=catalog.agents, clock=clock, settings=settings,
        observer=observers,
    )  # fmt: skip
    sessions = Sessions(deps)
    root = await asyncio.to_thread(root_key, config.token, config.home)
    sessions.callbacks = Callbacks(log, clock, root, config.home / "callbacks")
    return sessions, counters, plain


def watch_sessions(
    config: Config, owner: str, stack: contextlib.AsyncExitStack
) -> tuple[Counters, Observers]:  # fmt: skip
    """Return the counters and who is told of what sessions do: they and, where a collector is named, its exporter."""
    counters = Counters()
    traces = open_traces(config.traces_endpoint, owner)
    if traces is None:
        return counters, Observers([counters])
    stack.push_async_callback(asyncio.to_thread, traces.close)
    return counters, Observers([counters, traces])


def _silent(_line: str) -> None:
    return


def make_folders(config: Config) -> None:
    """Make home and run directory, private to this user. Raises Refused when the run directory is somebody else's."""
    for folder in (config.home, config.blobs_dir, config.images_dir, config.machines_dir, config.run_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            error = OutOfSpace if exc.errno == 28 else Unavailable
            raise error(f"cannot make {folder}: {exc.strerror}", hint="set RECESS_HOME to a folder you own") from exc
    _check_private(config.run_dir)


def _check_private(folder: Path) -> None:
    # It lies in a place where everybody may make folders: one made by another user could be listened to.
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise Refused(f"{folder} belongs to another user", hint="set RECESS_RUN_DIR to a private folder")
    if stat.S_IMODE(info.st_mode) & 0o077:
        folder.chmod(0o700)


def keeping_of(config: Config) -> Keeping:
    """Return the policy for stored snapshots."""
    return Keeping(
        keep_last=config.snapshot_keep, retention_s=config.snapshot_retention_s,
        quota_bytes=config.snapshot_quota_bytes, reserve_bytes=config.disk_reserve_bytes,
        check_every_s=config.snapshot_check_every_s,
        recompression=Recompression(
            config.recompress_after_s, config.recompress_level, config.recompress_frame_bytes, config.recompress_budget_s
        ),
    )  # fmt: skip


async def any_large(catalog: Catalog) -> bool:
    """Tell whether a snapshot here may be restored lazily, so that a pager should be at hand."""
    rows, _ = await catalog.snapshots.survey()
    pages = (row.figures.get("pages_captured", {}).get("memory", 0) for row in rows)
    return any(count * PAGE_BYTES >= LAZY_BYTES_MIN for count in pages)


async def finish_task(task: asyncio.Task[None]) -> None:
    """End a task that nobody waits for."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class LocalNode:
    """An open node. Make it with `await LocalNode.open(config)`."""

    def __init__(
        self, config: Config, stack: contextlib.AsyncExitStack, catalog: Catalog, log: SqlLog, broker: Broker,
        chosen: Chosen, machines: Manager, sessions: Sessions, images: ImageAdmin, transfers: Transfers, opened: Opened,
        at_hand: AtHand,
    ) -> None:  # fmt: skip
        self.config = config
        self.catalog = catalog
        self.log = log
        self.broker = broker
        self.machines = machines
        self.sessions = sessions
        self.images = images
        self.transfers = transfers
        self._opened = opened
        self._at_hand = at_hand
        self.recovered: dict[str, Any] = {}
        self.secrets = SecretStore()
        self.volumes = NamedVolumes(config.home / "volumes")
        self.counters = Counters()
        self.plain: PlainMachines | None = None  # the machines that are plain processes
        self.detach_on_close = True
        self._stack = stack
        self._chosen = chosen

    @classmethod
    async def open(cls, config: Config, *, progress: Progress = _silent, clock: Clock | None = None) -> LocalNode:
        """Open the home and take over what runs. Raises HomeLocked, Incompatible, Corrupt, OutOfSpace, Unavailable."""
        async with contextlib.AsyncExitStack() as stack:
            node = await cls._build(config, progress, clock or SystemClock(), stack)
            node._stack = stack.pop_all()
            return node
        raise AssertionError("unreachable")

    @classmethod
    async def _build(
        cls, config: Config, progress: Progress, clock: Clock, stack: contextlib.AsyncExitStack
    ) -> LocalNode:
        take_short_turns()
        make_folders(config)
        lock = HomeLock(config.home)
        lock.acquire()
        stack.callback(lock.release)
        arm_from_config(config.crash_point)
        claim_run_dir(config)
        await asyncio.to_thread(remove_orphans, config)
        db = await asyncio.to_thread(open_database, config)
        stack.push_async_callback(db.close)
        catalog = Catalog(db, node=node_name(config))
        opened = await asyncio.to_thread(open_store, config)
        store = opened.store
        stack.callback(store.close)
        chosen = await choose_drivers(config)
        for driver in (chosen.driver, *chosen.others.values()):
            stack.push_async_callback(driver.close)
        gate = NodeGate()
        authorities = Authorities(config.home / "authority.key")
        secrets = SecretStore(config.home / "secrets")
        broker = Broker(gate, secrets, clock, authorities=authorities)

        def free_bytes() -> int:
            return shutil.disk_usage(config.blobs_dir).free

        files = make_images(config, chosen.driver, progress)
        transfers = Transfers(config, catalog, store, files, clock, progress, free_bytes)
        stack.callback(transfers.stop)
        at_hand = AtHand(await asyncio.to_thread(open_page_files, config, free_bytes))
        stack.callback(at_hand.close)
        pagers = Pagers(config, at_hand.keep_file)
        stack.callback(pagers.close)
        parts = Parts(
            driver=chosen.driver, driver_why=chosen.reason, others=chosen.others, store=store, images=files,
            catalog=catalog, clock=clock, machines_dir=config.machines_dir, run_dir=config.run_dir, egress=broker, progress=progress,
            keeping=keeping_of(config), free_bytes=free_bytes, find_elsewhere=transfers.find, drop_caches=parse_policy(config.drop_caches),
            make_pager=pagers.make, lazy_memory=config.lazy_memory, at_hand=at_hand,
            first_pages=pagers.first_pages, volumes=NamedVolumes(config.home / "volumes"),
        )  # fmt: skip
        machines = Manager(parts)
        broker.bind(machines.siblings)
        kept = await open_log(config, db, clock)
        log = kept.log
        sessions, counters, plain = await open_sessions(config, catalog, log, machines, clock, stack)
        gate.bind(sessions.gate)
        machines.keeping.bind(sessions.snapshot_holds)
        images = ImageAdmin(config, lambda: roots_in_use(parts), partial(release_root, parts), progress)
        node = cls(
            config, stack, catalog, log, broker, chosen, machines, sessions, images, transfers, opened, at_hand
        )  # fmt: skip
        node.secrets, node.counters, node.plain = secrets, counters, plain
        stack.push_async_callback(node._end)
        node.recovered = dict(await machines.recover())
        node.recovered["sessions"] = len(await sessions.recover())
        keep_log(kept, sessions, stack, cluster=bool(config.database_url))
        node._start_reaper(clock, kept.keeper, stack)
        if chosen.driver.capabilities.lazy_memory and await any_large(catalog):
            stack.push_async_callback(finish_task, asyncio.create_task(pagers.warm(), name="pagers"))
        return node

    def _start_reaper(self, clock: Clock, keeper: LogKeeper, stack: contextlib.AsyncExitStack) -> None:
        async def tidy() -> Mapping[str, int]:
            packed = await asyncio.to_thread(self.transfers.drop_packed)
            swept = {f"log_{k}": n for k, n in asdict(await keeper.sweep()).items()}
            return {**await self.machines.tidy(), **swept, "packed_bytes": packed}

        task = asyncio.create_task(reap(clock, tidy), name="reaper")
        stack.push_async_callback(finish_task, task)

    async def _end(self) -> None:
        await self.sessions.shutdown(detach=self.detach_on_close)
        await self.machines.close(detach=self.detach_on_close)

    async def close(self, *, detach: bool = True) -> None:
        """End the node; `detach`: machines run on for the next server, else they are put away. May be called twice."""
        self.detach_on_close = detach
        await self._stack.aclose()

    # --- what the API shows of the node ------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """Return what this node is: driver and why, what it can do, what was recovered at its start."""
        return {
            "driver": self._chosen.driver.name,
            "driver_reason": self._chosen.reason,
            "other_drivers": sorted(self._chosen.others),
            "capabilities": asdict(self._chosen.driver.capabilities),
            "recovered": self.recovered,
            "store": self._opened.about(),
        }

    async def kept_ready(self) -> dict[str, Any]:
        """Return what each driver keeps started for restores to come, which is no machine's; those that do so at all."""
        kept = {d.name: await d.kept_ready() for d in (self._chosen.driver, *self._chosen.others.values())}
        return {name: asdict(one) for name, one in kept.items() if one.limit}

    async def doctor(self) -> dict[str, Any]:
        """Check the host, then run a guest all the way through snapshot and fork."""
        return await run_doctor(self.config, self._chosen, self.machines)

    def egress(self, machine_id: str, *, after: int = 0) -> dict[str, Any]:
        """Return the broker's newest decisions about a machine, oldest first, and how many there were in all."""
        allowed, denied, newest = self.broker.decisions_after(machine_id, after)
        found = {"allowed": allowed, "denied": denied, "number": allowed + denied}
        return {**found, "decisions": [asdict(decision) for decision in newest]}

    async def usage(self) -> dict[str, Any]:
        """Return what takes space on this node."""
        in_use = await self.images.used()
        return await usage(self.config, self.machines, self.images, in_use, await self.kept_ready())

    async def caches_settled(self) -> None:
        """Return when the page files that were to be written so far are."""
        await self._at_hand.settled()

    async def empty_caches(self) -> dict[str, int]:
        """Give back what is made again when it is needed; return the bytes by kind. Machines lose nothing: what they have
        mapped stays theirs (and on the disk) until they end. Later resumes, exports and restores read anew."""
        before = await asyncio.to_thread(allotted_bytes, self.config.run_dir / "templates")
        await self.machines.templates.evict(self.machines.templates_in_use(), keep=0)
        after = await asyncio.to_thread(allotted_bytes, self.config.run_dir / "templates")
        return {
            "templates": max(0, before - after),
            "page_files": await asyncio.to_thread(self._at_hand.empty),
            "packed_exports": await asyncio.to_thread(self.transfers.drop_packed, everything=True),
            "copies": await asyncio.to_thread(self._opened.drop_copies),
        }

    async def list_images(self) -> list[dict[str, Any]]:
        """Return all images."""
        return await self.images.list_all()

    async def get_image(self, name: str) -> dict[str, Any]:
        """Return one image."""
        return await self.images.get(name)

    async def create_image(self, name: str, packages: Sequence[str]) -> dict[str, Any]:
        """Build an image."""
        return await self.images.create(name, packages)

    async def remove_image(self, name: str) -> None:
        """Forget an image."""
        await self.images.remove(name)
