"""Folders of machines that have no row any more: whose they are, how long they stay, when they go.

A folder without a row is what a server leaves that dies between the two halves of a removal; it goes at the next start.
One that was given up because its row was damaged holds that row as text (`row.json`) and stays for a week, so that what
somebody removed in a hurry can still be had. In doubt a folder stays: whatever has a row, readable or not, or a VM.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Collection
from pathlib import Path

from recess.errors import OutOfSpace, Unavailable
from recess.machines.parts import Parts

ROW_NAME = "row.json"
LEFT_S = 7 * 86400.0


def is_leaving(name: str, *, known: Collection[str], at_start: bool) -> bool:
    """Decide whether a folder of this name belongs to nobody. A template that is being made has a folder and no row, so
    its folder is a leaving only while nobody makes any: at the start."""
    return name not in known and (name.startswith("mch_") or (at_start and name.startswith("tpl_")))


class Leavings:
    """The folders below `machines_dir` that no row names."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def put_aside(self, machine_id: str) -> Path:
        """Write a damaged row as text into its folder, which from now on counts as given up; return the folder.

        Raises OutOfSpace, Unavailable: the row is then better not deleted.
        """
        table, db = self._parts.catalog.machines.table, self._parts.catalog.db
        _, damaged = await db.read(lambda tx: table.survey_in(tx, "id = ?", (machine_id,)))
        columns = dict(damaged[0].columns) if damaged else {"id": machine_id}
        folder = self._parts.directory(machine_id)
        try:
            await asyncio.to_thread(_write, folder, json.dumps(columns, indent=2).encode())
        except OSError as exc:
            error = OutOfSpace if exc.errno == 28 else Unavailable
            raise error(f"the damaged row of {machine_id} cannot be kept in {folder}: {exc.strerror}") from exc
        return folder

    async def sweep(self, *, at_start: bool) -> int:
        """Remove what nobody needs; returns how many folders went.

        The folders are listed before the rows: a machine's row is there before its folder, so a folder that was seen
        and has no row has lost it.
        """
        found = await asyncio.to_thread(_folders, self._parts.machines_dir)
        known = {*await self._parts.catalog.machines.all_ids(), *self._parts.leftovers()}
        now = self._parts.clock.wall_s()
        gone = 0
        for folder in found:
            if is_leaving(folder.name, known=known, at_start=at_start) and now - _left_at(folder) >= LEFT_S:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                gone += 1
        return gone


def _folders(machines_dir: Path) -> list[Path]:
    return [path for path in machines_dir.iterdir() if path.is_dir()] if machines_dir.is_dir() else []


def _left_at(folder: Path) -> float:
    """Return when a folder was given up (wall seconds); long ago for one that nobody gave up."""
    try:
        return (folder / ROW_NAME).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write(folder: Path, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{ROW_NAME}"
    aside.write_bytes(data)
    aside.replace(folder / ROW_NAME)
