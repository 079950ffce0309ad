"""Rows of the catalog to the records of this room and back. Pure translation; a row that lies is Corrupt."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import msgspec

from recess.broker import is_socket_path
from recess.catalog import Damaged
from recess.catalog.machines import MachineRecord
from recess.catalog.snapshots import SnapshotRecord
from recess.errors import Corrupt, InvalidSpec, Unsupported
from recess.machines.contract import BootFiles, Capabilities, VmSpec
from recess.machines.restartpolicy import parse_policy
from recess.machines.service import MachineRow, MachineSpec, Mount, SnapshotRow
from recess.machines.states import DAMAGED, STATES
from recess.units import MIB, PAGE_BYTES

DAMAGED_HINT = "recess rm --force {} gives it up and keeps its files aside; or restore a backup of the database"
MEMORY_BYTES_MIN = 64 * MIB
MEMORY_BYTES_MAX = 64 << 30
DISK_BYTES_MIN = 64 * MIB
DISK_BYTES_MAX = 1 << 40
CPUS_MAX = 64
PORTS_MAX = 64
VOLUMES_MAX = 16
IDLE_S_MAX = 30 * 86400
VOLUME_BYTES_MAX = 64 << 30
LOST_FOLDERS = ("proc", "sys", "dev", "run", "tmp")


def spec_to_json(spec: MachineSpec) -> dict[str, Any]:
    """Return a machine spec as plain JSON data."""
    data = msgspec.to_builtins(asdict(spec))
    return dict(data)


def spec_from_json(data: Mapping[str, Any], where: str) -> MachineSpec:
    """Return the spec of a row or a manifest; raises Corrupt naming `where`."""
    try:
        return msgspec.convert(dict(data), MachineSpec)
    except (msgspec.ValidationError, TypeError) as exc:
        raise Corrupt(f"{where}: unreadable machine spec: {exc}") from exc


def manifest_machine(manifest: Mapping[str, Any], snapshot_id: str) -> MachineSpec:
    """Return the machine spec that a snapshot's manifest holds. Raises Corrupt."""
    spec = manifest.get("spec")
    if not isinstance(spec, Mapping) or not isinstance(spec.get("machine"), Mapping):
        raise Corrupt(f"snapshot {snapshot_id[:16]}: its manifest holds no machine spec")
    return spec_from_json(spec["machine"], f"snapshot {snapshot_id[:16]}")


def machine_row(record: MachineRecord) -> MachineRow:
    """Return a machine as this room shows it."""
    return MachineRow(
        id=record.id, name=record.name, state=record.state, spec=spec_from_json(record.spec, f"machine {record.id}"),
        driver=record.driver, template=record.template, snapshot=record.snapshot, session=record.session,
        created=record.created, exit_code=record.exit_code, status=record.status, meta=dict(record.meta),
    )  # fmt: skip


def vm_of(record: MachineRecord) -> Mapping[str, Any] | None:
    """Return what a row says of its VM (as `templates.vm_json`), with its driver; None if it says nothing."""
    vm = record.meta.get("vm")
    return {**vm, "driver": record.driver} if isinstance(vm, Mapping) else None


def damaged_machine(row: Damaged) -> MachineRow:
    """Return what a list shows of a machine whose row cannot be read."""
    return MachineRow(
        id=row.id, name=row.columns.get("name", ""), state=DAMAGED, spec=MachineSpec(image="?"), driver="", template="",
        snapshot="", session=row.columns.get("session", ""), created=0.0, exit_code=None, status=row.error.message,
        meta={"hint": DAMAGED_HINT.format(row.id)},
    )  # fmt: skip


def check_row(record: MachineRecord) -> MachineRow:
    """Return a machine as this room shows it. Raises Corrupt for a row that can be read but makes no sense."""
    if record.state not in STATES:
        raise Corrupt(f"machine {record.id}: unknown state {record.state!r}", hint=DAMAGED_HINT.format(record.id))
    if not isinstance(record.meta.get("epoch", 0), int):
        raise Corrupt(f"machine {record.id}: its epoch is no number", hint=DAMAGED_HINT.format(record.id))
    return machine_row(record)


def is_sound(record: MachineRecord) -> bool:
    """Tell whether a row that can be read makes sense."""
    try:
        check_row(record)
    except Corrupt:
        return False
    return True


def shown_machine(record: MachineRecord) -> MachineRow:
    """Return a machine as lists show it: one whose row makes no sense is damaged, too."""
    try:
        return check_row(record)
    except Corrupt as exc:
        return damaged_machine(Damaged(record.id, exc, {"name": record.name, "session": record.session}))


def damaged_snapshot(row: Damaged) -> SnapshotRow:
    """Return what a list shows of a snapshot whose row cannot be read: `why` is "damaged"."""
    shown = {name: row.columns.get(name, "") for name in ("name", "machine", "session", "template", "parent")}
    figures = {"damaged": row.error.message, "hint": f"recess snapshots rm --force {row.id} gives it up"}
    return SnapshotRow(id=row.id, log_position=0, epoch=0, why=DAMAGED, created=0.0, figures=figures, **shown)


def snapshot_row(record: SnapshotRecord) -> SnapshotRow:
    """Return a snapshot as this room shows it."""
    return SnapshotRow(
        id=record.id, name=record.name, machine=record.machine, session=record.session,
        log_position=record.log_position, epoch=record.epoch, why=record.why, created=record.created,
        template=record.template, parent=record.parent, figures=dict(record.figures),
    )  # fmt: skip


def check_spec(spec: MachineSpec, can: Capabilities) -> None:
    """Refuse a spec that no machine can have. Raises InvalidSpec, Unsupported; nothing was changed."""
    _between("memory", spec.memory_bytes, MEMORY_BYTES_MIN, MEMORY_BYTES_MAX)
    _between("disk", spec.disk_bytes, DISK_BYTES_MIN, DISK_BYTES_MAX)
    if not 1 <= spec.cpus <= CPUS_MAX:
        raise InvalidSpec(f"cpus: from 1 to {CPUS_MAX}, got {spec.cpus}")
    if spec.memory_bytes % MIB or spec.disk_bytes % PAGE_BYTES:
        raise InvalidSpec("memory: whole mebibytes; disk: whole 4 KiB blocks")
    if spec.network not in ("broker", "none", "full"):
        raise InvalidSpec(f"network: broker, none or full, got {spec.network!r}")
    if spec.network == "full" and not can.network_full:
        raise Unsupported(
            "this driver gives machines no network card",
            hint="--net broker with --allow HOST lets them out by HTTP and CONNECT, and a freeze breaks no address; "
            "recess doctor says what this driver has",
        )
    if not 0 <= spec.idle_s <= IDLE_S_MAX:
        raise InvalidSpec(f"idle: from 0 to {IDLE_S_MAX} s, got {spec.idle_s:g}")
    if spec.idle_s and not can.snapshot:
        raise Unsupported("this driver's machines cannot be suspended, so they have no idle policy")
    if parse_policy(spec.restart) is not None and (not spec.argv or spec.remove_on_exit):
        raise InvalidSpec("restart: needs a command, and a machine that is not removed when it ends")
    if len(spec.ports) > PORTS_MAX:
        raise InvalidSpec(f"ports: at most {PORTS_MAX}")
    for port in spec.ports:
        _check_port(*port)
    if spec.sockets and spec.network == "none":
        raise InvalidSpec("sockets: a machine with --net none has no way to the host's", hint="use --net broker")
    for key in spec.env:
        if not key or "=" in key or "\0" in key or "\n" in key:
            raise InvalidSpec(f"env: not a variable name: {key!r}")
    if any("\0" in word for word in (*spec.argv, *spec.env.values(), spec.cwd)):
        raise InvalidSpec("argv, env and cwd must not hold NUL bytes")
    if not spec.cwd.startswith("/"):
        raise InvalidSpec(f"cwd: an absolute path is needed, got {spec.cwd!r}")
    _check_volumes(spec.volumes)


def _check_port(ip: str, host: int, guest: int | str) -> None:
    shown = f"port {ip}:{host}:{guest}" if host else f"port {ip}:{guest}"
    if ip.startswith("/") and host:
        raise InvalidSpec(f"{shown}: a socket has no port")
    if not ip or not 0 <= host < 65536:
        raise InvalidSpec(f"{shown}: a host port is 0 to 65535")
    if isinstance(guest, int) and not 0 < guest < 65536:
        raise InvalidSpec(f"{shown}: a guest port is 1 to 65535")
    for path in (text for text in (ip, guest) if isinstance(text, str) and (text is guest or text.startswith("/"))):
        if not is_socket_path(path):
            raise InvalidSpec(f"{shown}: {path!r} is no path of a socket", hint="absolute, at most 107 bytes")


def _check_volumes(volumes: Sequence[Mount]) -> None:
    if len(volumes) > VOLUMES_MAX:
        raise InvalidSpec(f"volumes: at most {VOLUMES_MAX}")
    for mount in volumes:
        target = mount.target
        if not target.startswith("/") or posixpath.normpath(target) != target or target == "/" or "\0" in target:
            raise InvalidSpec(f"volume {mount.source}: an absolute path in the machine is needed, got {target!r}")
        if target.split("/")[1] in LOST_FOLDERS:
            raise InvalidSpec(
                f"volume {mount.source}: {target} is lost whenever the machine boots", hint="choose another place in it"
            )
        if not 1 <= mount.size_bytes <= VOLUME_BYTES_MAX:
            raise InvalidSpec(f"volume {mount.source}: its size is at most {VOLUME_BYTES_MAX} bytes")
    targets = sorted(mount.target for mount in volumes)
    for outer, inner in pairwise(targets):
        if inner == outer or inner.startswith(outer + "/"):
            raise InvalidSpec(
                f"volumes: {inner} lies in {outer}", hint="one folder of the machine belongs to one volume"
            )


def _between(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidSpec(f"{what}: from {low // MIB} MiB to {high // MIB} MiB, got {value} bytes")


def vm_spec(spec: MachineSpec, boot: BootFiles, driver: str) -> VmSpec:
    """Return what the driver of this name needs of a machine's spec."""
    return VmSpec(spec.memory_bytes, spec.cpus, spec.disk_bytes, boot, spec.network, driver)
