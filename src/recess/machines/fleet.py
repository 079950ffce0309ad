"""The VMs of this node while they live: the table, their watchers, their ends, and taking them over after a restart.

Rows are the durable truth; this is what stands behind them in memory. One lock per machine orders everything that
changes it. A VM that ends without having been asked is noticed here and its row falls (`states.after_loss`) before
anybody who waits for the end is woken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from recess.catalog.machines import MachineRecord
from recess.crashpoints import crash_point
from recess.errors import IllegalState, MissingTool, OutOfSpace, RecessError
from recess.guestlink.link import GuestLink
from recess.machines import keptdisk
from recess.machines.contract import Vm
from recess.machines.forward import Forwarder
from recess.machines.incoming import Incoming
from recess.machines.leavings import Leavings
from recess.machines.live import Live
from recess.machines.mounting import Mounting
from recess.machines.parts import UNDO, Parts
from recess.machines.records import is_sound, spec_from_json, vm_of
from recess.machines.restarting import Restarts
from recess.machines.stalls import Stalls, check_goes
from recess.machines.starting import Starter, finish
from recess.machines.states import (
    CREATING,
    EXITED,
    PAUSED,
    RUNNING,
    SUSPENDED,
    WITH_VM,
    WITHOUT_VM,
    after_loss,
    next_state,
)
from recess.machines.templates import Templates

LINGER_S = 5.0
"""How long a VM outlives its main process, so that a client that attaches a moment later still gets all the output."""

ADOPT_AT_ONCE = 8
REMOVING = "removing"
"""In a row's meta: it is being removed."""

SETTLE_S = 5.0

log = logging.getLogger(__name__)


class Fleet:
    """Every VM that this server holds."""

    def __init__(self, parts: Parts, templates: Templates) -> None:
        self._parts = parts
        self._templates = templates
        self._live: dict[str, Live] = {}
        self._going: dict[str, Live] = {}  # their VM is gone, their row is about to say so
        self._locks: dict[str, asyncio.Lock] = {}
        self._aside: set[asyncio.Task[None]] = set()
        self.incoming = Incoming()
        self.doors: dict[str, Forwarder] = {}  # ports of machines that sleep
        self.admitted: Callable[[Live], None] = lambda _live: None
        self.reach: Callable[[str], Awaitable[GuestLink]] | None = None
        self.leavings = Leavings(parts)
        self.stalls = Stalls(parts)
        self.mounting = Mounting(parts)
        self.starter = Starter(parts, self.incoming, self.link_of, self.main_exited, self.doors)
        self.linger_s = LINGER_S
        self._restarts = Restarts(parts, self.starter, lambda live: self._live.get(live.id) is live)

    def lock(self, machine_id: str) -> asyncio.Lock:
        """Return the lock that orders the changes of one machine."""
        return self._locks.setdefault(machine_id, asyncio.Lock())

    def find(self, machine_id: str) -> Live | None:
        """Return the machine's VM, if it has one here."""
        return self._live.get(machine_id)

    def find_going(self, machine_id: str) -> Live | None:
        """Return the machine's VM, also one that has ended and whose row does not say so yet."""
        return self._live.get(machine_id) or self._going.get(machine_id)

    def need(self, machine_id: str) -> Live:
        """Return the machine's VM; raises IllegalState when it is gone (its row is about to say so)."""
        live = self._live.get(machine_id)
        if live is None:
            raise IllegalState(f"machine {machine_id} has no VM at this moment", hint="recess ps -a")
        return live

    def all(self) -> list[Live]:
        """Return every VM."""
        return list(self._live.values())

    def link_of(self, machine_id: str) -> Callable[[], Awaitable[GuestLink]]:
        """Return a function that gives the machine's current link."""

        async def link() -> GuestLink:
            if self.reach is not None:
                return await self.reach(machine_id)
            return self.need(machine_id).link

        return link

    def link_to(self, live: Live) -> GuestLink:
        """Return the link of a VM that runs. Raises IllegalState for a paused one, OutOfSpace for one that stands still."""
        if live.paused_since:
            next_state(PAUSED, "use", f"machine {live.id}")
        check_goes(live, live.id)
        return live.link

    async def need_running(self, machine_id: str) -> Live:
        """Return the VM of a machine that runs by its row. Raises NotFound, IllegalState that says what to do."""
        live = self._live.get(machine_id)
        if live is None:
            record = await self._parts.catalog.machines.get(machine_id)
            next_state(record.state, "use", f"machine {record.name}")
            live = self.need(record.id)
        return live

    async def close_doors(self, machine_id: str) -> None:
        """Close the ports of a machine that sleeps, if it does."""
        door = self.doors.pop(machine_id, None)
        if door is not None:
            await door.stop()

    def admit(self, live: Live) -> None:
        """Take a VM into the table and watch it."""
        self._live[live.id] = live
        self.admitted(live)
        live.watcher = asyncio.create_task(self._watch(live), name=f"watch-{live.id}")
        live.stall_watcher = asyncio.create_task(self.stalls.watch(live), name=f"stalls-{live.id}")

    def aside(self, work: Awaitable[None]) -> None:
        """Run something that belongs to no caller; it is awaited when the node closes."""
        task = asyncio.ensure_future(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    # --- ends ------------------------------------------------------------------------------------------------

    async def _watch(self, live: Live) -> None:
        reason = await live.vm.wait_dead()
        live.reason = live.ending or reason
        self._going[live.id] = live
        try:
            await self._drop(live)
            if live.keep_disk:
                self._keep_disk(live.id)
            await live.vm.kill()  # its process is gone by itself: sockets, disk and connections go with this
            if not live.ending:
                await self._fall(live.id, reason)
        except RecessError as exc:
            # Nobody waits for this task. A row that cannot be written now falls when the next server looks at it.
            log.warning("machine %s has ended (%s), its row does not say so yet: %s", live.id, reason, exc.message)
        finally:
            del self._going[live.id]
            live.gone.set()

    async def _drop(self, live: Live) -> None:
        if self._live.get(live.id) is live:
            del self._live[live.id]
        await live.let_go()
        if self._parts.egress is not None:
            self._parts.egress.unregister(live.id)

    async def _fall(self, machine_id: str, reason: str) -> None:
        def decide(row: MachineRecord) -> dict[str, object]:
            if row.state not in WITH_VM:
                return {}
            disk = keptdisk.is_kept(self._parts.directory(machine_id))
            state, status = after_loss(row.state, row.snapshot, reason, disk=disk)
            return {"state": state, "status": status}

        if await self._parts.catalog.machines.find(machine_id) is not None:
            row = await self._parts.catalog.machines.change(machine_id, decide)
            self._parts.tell("lost", machine_id, row.name, reason=reason, state=row.state)

    async def end(self, machine_id: str, why: str, *, keep_disk: bool = False) -> None:
        """End a VM on purpose; the row is the caller's. Returns when nothing of it is left, but for its disk under its
        kept name with `keep_disk`; no VM is fine."""
        live = self._live.get(machine_id)
        if live is None:
            return
        if not live.ending:
            live.ending, live.keep_disk = why, keep_disk
        if live.keep_disk:
            self._keep_disk(machine_id)  # before the driver removes it
        await finish(live.vm.kill())
        if live.watcher is not None:  # not `gone`: a watcher that was cancelled with all that runs here never says so
            await asyncio.wait({live.watcher})

    def _keep_disk(self, machine_id: str) -> None:
        try:
            keptdisk.keep(self._parts.directory(machine_id))
        except RecessError as exc:
            log.warning("machine %s: %s", machine_id, exc.message)  # its end must go on all the same

    async def fail(self, live: Live, reason: str) -> None:
        """End a VM that cannot be served any more; its row falls as if the VM had died by itself."""
        await self.end(live.id, reason, keep_disk=True)
        await self._fall(live.id, reason)

    async def main_exited(self, machine_id: str, code: int) -> None:
        """Note that a main process ended; the VM follows a moment later."""
        self.aside(self._exited(machine_id, code))

    async def _exited(self, machine_id: str, code: int) -> None:
        def decide(row: MachineRecord) -> dict[str, object]:
            if row.state not in (RUNNING, PAUSED):
                return {}
            return {"state": next_state(row.state, "exit"), "exit_code": code, "status": f"exited ({code})"}

        async with self.lock(machine_id):
            live = self._live.get(machine_id)
            if live is None:
                return
            again = self._restarts.due(live, code)
            if again is None:
                await self.mounting.give_back(live, at_rest=not live.spec.remove_on_exit)
                row = await self._parts.catalog.machines.change(machine_id, decide)
                self._parts.tell("die", machine_id, row.name, exit_code=code)
        if again is not None:
            await self._start_again(live, again, code)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.linger_s):
                await live.gone.wait()
        async with self.lock(machine_id):
            if self._live.get(machine_id, live) is not live:
                return  # it was brought back meanwhile, and has another VM
            if not live.spec.remove_on_exit and not live.gone.is_set():
                await self.settle(live)
            await self.end(machine_id, "its main process ended", keep_disk=not live.spec.remove_on_exit)
            if live.spec.remove_on_exit and row.state == EXITED:
                await self.forget(machine_id)

    async def _start_again(self, live: Live, delay_s: float, code: int) -> None:
        """Start a main process anew by its restart policy; one that cannot be started is over."""
        if not await self._restarts.wait(live, delay_s):
            return
        async with self.lock(live.id):
            if self._live.get(live.id) is not live:
                return
            try:
                await self._restarts.start(live)
            except RecessError as exc:
                live.stopping = True  # its policy has come to its end, too
                log.warning("machine %s: its process is not started again: %s", live.id, exc.message)
            else:
                row = await self._parts.catalog.machines.get(live.id)
                self._parts.tell("restart", live.id, row.name, exit_code=code, restarts=live.restarts)
                return
        await self.main_exited(live.id, code)

    async def settle(self, live: Live) -> None:
        """Have the guest write everything to its disk before its end (bounded): a disk that needs no recovery."""
        if live.paused_since == 0.0 and not live.stalled:
            with contextlib.suppress(RecessError):
                await live.link.freeze(sync=True, timeout_s=SETTLE_S)

    async def forget(self, machine_id: str) -> None:
        """Drop the row, the folder and the handlers of a machine without a VM. A crash in between leaves a folder that
        has no row, which the next start removes."""
        await self._parts.catalog.machines.delete(machine_id)
        await self.close_doors(machine_id)
        crash_point("machines.row_deleted")
        self._parts.tell("destroy", machine_id, "")
        await self.starter.forget_files(machine_id)
        self.incoming.forget(machine_id)
        self._locks.pop(machine_id, None)  # who waits for it finds no row; ids are never used again

    async def note_removal(self, machine_id: str) -> None:
        """Note in a row that its machine is being removed, before its VM is ended: a server that dies in between leaves
        a row that the next one removes, not a dead machine."""
        await self._parts.catalog.machines.change(machine_id, lambda row: {"meta": {**row.meta, REMOVING: True}})
        crash_point("machines.remove_noted")

    async def give_up(self, machine_id: str, *, force: bool) -> str:
        """Remove a row that cannot be read; return the folder, which stays a while with everything that is in it.

        Raises IllegalState without `force` when there is a VM: whether it is to run, nobody can tell.
        """
        async with self.lock(machine_id):
            if machine_id in self._parts.leftovers() and not force:
                raise IllegalState(
                    f"machine {machine_id} has a damaged row, and a VM", hint="give both up with --force"
                )
            await self.end(machine_id, "removed", keep_disk=True)
            await self._end_stray(machine_id)
            folder = await self.leavings.put_aside(machine_id)
            crash_point("machines.put_aside")
            await self._parts.catalog.machines.delete(machine_id)
            self.incoming.forget(machine_id)
            return str(folder)

    # --- servers come and go -----------------------------------------------------------------------------------

    async def recover(self) -> dict[str, int]:
        """Take over what an earlier server left: adopt VMs that live, let the rows of the others fall, kill strays.

        Safe to run after a crash at any point: it looks only at rows and at what really runs. A machine that was being
        made is undone, as its maker was told nothing; one that was being removed goes. What a damaged row stands for is left exactly as it is, VM and
        files: whether they are needed, nobody can tell. It never keeps the others from coming up.
        """
        rows = self._parts.catalog.machines
        records, damaged = await rows.survey_vms(WITHOUT_VM)
        sound = [record for record in records if is_sound(record)]
        unclear = {row.id for row in damaged} | {r.id for r in records if not is_sound(r)}
        room = asyncio.Semaphore(ADOPT_AT_ONCE)

        async def one(record: MachineRecord) -> bool:
            async with room:
                return await self._recover_one(record)

        begun = [record for record in sound if record.state == CREATING or record.meta.get(REMOVING)]
        for record in begun:
            await self._end_stray(record.id)
            if record.state == CREATING:
                await self._parts.catalog.once.release(record.id)  # its maker was told nothing, and may ask again
            await self.forget(record.id)
        there = [record for record in sound if record not in begun]
        adopted = sum(await asyncio.gather(*(one(record) for record in there)))
        strays = [v for v in self._parts.leftovers() if v not in self._live and v not in unclear]
        for vm_id in strays:
            await self._end_stray(vm_id)
            if await self._is_put_away(vm_id):
                keptdisk.drop(self._parts.directory(vm_id))
        await self._forget_exited()
        await self.leavings.sweep(at_start=True)
        return {
            "adopted": adopted, "lost": len(there) - adopted, "unfinished": len(begun), "strays": len(strays),
            "damaged": len(unclear),
        }  # fmt: skip

    async def _end_stray(self, vm_id: str) -> None:
        """End a VM that an earlier server started; its disk is kept, unless one is: then this VM was being brought back
        when that server died, and what is kept is newer."""
        directory = self._parts.directory(vm_id)
        try:
            vm = await self._parts.leftovers().get(vm_id, self._parts.driver).adopt(vm_id, directory)
        except MissingTool:
            vm = None  # its driver's program is gone, and has taken it along
        if not keptdisk.is_kept(directory):
            self._keep_disk(vm_id)
        if vm is not None:
            await vm.kill()
        keptdisk.clear(directory)

    async def _is_put_away(self, machine_id: str) -> bool:
        """Tell whether a snapshot holds all that the machine's VM had: its server died on the way from row to end."""
        table, db = self._parts.catalog.machines.table, self._parts.catalog.db
        good, _ = await db.read(lambda tx: table.survey_in(tx, "id = ?", (machine_id,)))
        return bool(good) and good[0].state == SUSPENDED

    async def _forget_exited(self) -> None:
        table, db = self._parts.catalog.machines.table, self._parts.catalog.db
        exited, _ = await db.read(lambda tx: table.survey_in(tx, "state = ?", (EXITED,)))
        for record in exited:
            if is_sound(record) and spec_from_json(record.spec, record.id).remove_on_exit:
                await self.forget(record.id)

    async def _recover_one(self, record: MachineRecord) -> bool:
        reason = "it was gone when the server came back"
        try:
            driver = self._parts.leftovers().get(record.id, self._parts.driver)
            vm = await driver.adopt(record.id, self._parts.directory(record.id))
            if vm is not None:
                try:
                    await self._reattach(record, vm)
                except UNDO:
                    self._live.pop(record.id, None)
                    self._keep_disk(record.id)
                    await finish(vm.kill())
                    raise
                return True
        except RecessError as exc:
            reason = f"it could not be taken over: {exc.message}"
        # Its VM is gone. If it went while no server was there, its disk still has the driver's name.
        self._keep_disk(record.id)
        keptdisk.clear(self._parts.directory(record.id))
        await self._fall(record.id, reason)
        return False

    async def _reattach(self, record: MachineRecord, vm: Vm) -> None:
        spec = spec_from_json(record.spec, f"machine {record.id}")
        epoch = int(record.meta.get("epoch", 0))
        template = await self._templates.under(record.template, vm_of(record))
        live = Live(record.id, vm, spec, template, epoch, used_s=self._parts.clock.monotonic_s())
        live.parent = str(record.meta.get("parent", ""))
        live.thaw = self.starter.thaw_maker(record, epoch)
        live.stalled = await vm.stalled()
        if live.stalled:
            live.revive = lambda: self._revive(record, live)  # nothing inside answers before there is room
            self.admit(live)
            return
        await self._serve_again(record, live)

    async def _revive(self, record: MachineRecord, live: Live) -> None:
        try:
            await self._serve_again(record, live)
        except RecessError as exc:
            if await live.vm.stalled():
                raise OutOfSpace(f"machine {record.name} stalled again") from exc
            # Aside: this runs in a task that ends with the VM.
            self.aside(self.fail(live, f"it stalled, and could not be taken over: {exc.message}"))

    async def _serve_again(self, record: MachineRecord, live: Live) -> None:
        keptdisk.drop(self._parts.directory(record.id))  # of an earlier end: it runs, so that is over
        await live.vm.unpause()  # of a VM that was paused there is no link before
        self.starter.let_out(live)
        if record.state == PAUSED:
            # The server may have died between the vCPUs and the row: bring it to exactly the state the row names.
            await live.link.freeze(timeout_s=5.0)
            await live.vm.pause()
            live.workload_frozen, live.paused_since = True, self._parts.clock.monotonic_s()
        elif (await live.link.info()).get("frozen") and live.thaw is not None:
            await live.link.thaw(live.thaw())  # a snapshot was being taken when the server died
        ports = await self.starter.open_ports(live, fall_back=True)
        if self.find(live.id) is not live:
            self.admit(live)
        await self._parts.catalog.machines.update(record.id, meta={**record.meta, "ports": [list(p) for p in ports]})
        if record.state == RUNNING:
            await self.starter.attach_main(live, self.starter.logged(record.id))

    async def detach(self) -> None:
        """Let go of every VM; they run on under their keepers for the next server."""
        for live in self.all():
            live.detached = True
            if live.watcher is not None:
                live.watcher.cancel()
                await asyncio.gather(live.watcher, return_exceptions=True)
            await live.let_go()
            with contextlib.suppress(RecessError):
                await live.vm.detach()
        self._live.clear()
        for task in list(self._aside):
            task.cancel()
        await asyncio.gather(*self._aside, return_exceptions=True)
