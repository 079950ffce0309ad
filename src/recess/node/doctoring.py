"""`recess doctor`: the host's checks, then a guest that is run for real, with the level it reached.

Levels, each proven by doing it: driver found -> machine created (booted, thawed) -> a command ran in it -> forked.
A check that fails ends the guest's part; whatever was started is removed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict
from typing import Any

from recess.config import Config
from recess.errors import GuestFailed, RecessError
from recess.guestlink.link import ExecRequest
from recess.images import BASE_IMAGE, ImageStore
from recess.machines.contract import Driver
from recess.machines.manager import Manager
from recess.machines.service import MachineSpec
from recess.node.doctor import judge_host, read_host
from recess.node.drivers import Chosen, try_driver
from recess.units import MIB, format_duration

Check = dict[str, Any]


def check(name: str, ok: bool, detail: str, hint: str = "") -> Check:
    """Return one line of the report."""
    return {"name": name, "ok": ok, "detail": detail, "hint": hint}


async def run_doctor(config: Config, chosen: Chosen, machines: Manager) -> dict[str, Any]:
    """Return {"ok", "checks", "level"}."""
    checks = await _host_checks(config) if chosen.driver.capabilities.own_kernel else []
    checks.append(await _driver_check(chosen))
    checks += [await _other_check(driver) for driver in chosen.others.values()]
    level = "none"
    if all(c["ok"] for c in checks):
        guest, level = await _try_guest(machines)
        checks.extend(guest)
    return {"ok": all(c["ok"] for c in checks), "checks": checks, "level": level}


async def _host_checks(config: Config) -> list[Check]:
    def look() -> list[Check]:
        try:
            ImageStore(config.images_dir).get(BASE_IMAGE)
            base = True
        except RecessError:
            base = False
        return [asdict(found) for found in judge_host(read_host(config, base_image=base))]

    return await asyncio.to_thread(look)


async def _driver_check(chosen: Chosen) -> Check:
    try:
        found = await chosen.driver.probe(fresh=True)  # what was true when the run folder was made may not be any more
    except RecessError as exc:
        return check("driver", False, f"{chosen.driver.name}: {exc.message}", exc.hint)
    said = ", ".join(f"{k} {v}" for k, v in found.items() if isinstance(v, str | int) and k != "driver")
    return check("driver", True, f"{chosen.driver.name} ({chosen.reason}): {said}")


async def _other_check(driver: Driver) -> Check:
    """Say of a driver that the node does not run on whether a machine could ask for it."""
    trial = await try_driver(driver)
    if not trial.engine:
        return check(f"driver {driver.name}", True, f"not available here: {trial.said}")
    return check(f"driver {driver.name}", True, f"works too ({trial.engine}); `--driver {driver.name}` asks for it")


async def _try_guest(machines: Manager) -> tuple[list[Check], str]:
    checks: list[Check] = []
    level = "none"
    made: list[str] = []
    began = time.monotonic()

    def passed(name: str, detail: str) -> None:
        nonlocal began
        checks.append(check(name, True, f"{detail} ({format_duration(time.monotonic() - began)})"))
        began = time.monotonic()

    step = "guest starts"
    try:
        row = await machines.create(MachineSpec(memory_bytes=512 * MIB), name="")
        made.append(row.id)
        level = "starts"
        passed(step, "a machine of the image base was forked from its template and thawed")
        step = "guest runs a command"
        job = await (await machines.link(row.id)).exec(ExecRequest(argv=["true"], cwd="/"))
        if (code := await job.wait()) != 0:
            raise GuestFailed(f"`true` ended with {code}")
        level = "runs"
        passed(step, "`true` ended with 0")
        step = "guest is snapshotted and forked"
        made += [child.id for child in await machines.fork(row.id)]
        level = "forks"
        passed(step, "a running machine was captured, stored and restored as a child")
    except RecessError as exc:
        checks.append(check(step, False, exc.message, exc.hint))
    finally:
        for machine_id in made:
            with contextlib.suppress(RecessError):
                await machines.remove(machine_id, force=True)
    return checks, level
