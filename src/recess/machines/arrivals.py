"""Snapshots that were not taken here: how one from another home or an archive gets a row of the catalog.

A foreign snapshot is nobody's history here: its row names no machine and no session of this home (whose ids a stranger
could write into a manifest), so no resume, rewind or retention ever takes it for one's own. What it may do when it is
restored stands in its machine spec: `asks_for` says it in words, for whoever has to agree. Pure but for the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recess.catalog import Catalog
from recess.catalog.snapshots import TABLE, SnapshotRecord, find_ref_in, insert_in, tag_in
from recess.db import Tx
from recess.machines.records import manifest_machine


def asks_for(manifest: Mapping[str, Any], snapshot_id: str) -> list[str]:
    """Return what a machine restored from this manifest may do beyond itself: [] for nothing. Raises Corrupt."""
    spec = manifest_machine(manifest, snapshot_id)
    out = [f"reach {host}" for host in spec.allow]
    out += [f"use the secret {name!r} at {url}" for name, url in spec.routes.items()]
    out += [f"use the secret {name!r} at {hosts}" for name, _, hosts in (text.partition("@") for text in spec.secrets)]
    out += [f"listen on {ip}" for ip, _, _ in spec.ports if not ip.startswith("127.") and ip != "::1"]
    out += [f"have a copy of the host's {m.source} (when `recess sync` is asked for)" for m in spec.volumes]
    out += [f"use the host's socket {host}" for host, _ in spec.sockets]
    if spec.network == "full":
        out.append("use the network of this host")
    return out


def foreign_record(manifest: Mapping[str, Any], snapshot_id: str, how: str, new_bytes: int) -> SnapshotRecord:
    """Return the row of a snapshot that came from elsewhere; `how`: imported, pulled, found."""
    figures = {
        "forkable": bool(manifest["forkable"]),
        "new_bytes": new_bytes,
        "arrived": how,
        "from": {"machine": manifest["machine"], "session": manifest["session"], "why": manifest["why"]},
    }
    return SnapshotRecord(
        id=snapshot_id,
        name="",
        machine="",
        created=int(manifest["created_ms"]) / 1000,
        log_position=0,
        why=how,
        template=str(manifest["template"]),
        parent=str(manifest["parent"]),
        figures=figures,
    )


async def add_foreign(
    catalog: Catalog, record: SnapshotRecord, *, wanted: str = "", known_as: str = "", now: float
) -> str:
    """See that there is a row, and return the name it got, or has. `wanted`: the name a user asks for, taken from whoever
    has it; `known_as`: what it was called elsewhere, given only if nobody here has that name. Raises BadInput."""

    def run(tx: Tx) -> str:
        if TABLE.find_in(tx, record.id) is None:
            insert_in(tx, record)
        name = wanted or (known_as if known_as and find_ref_in(tx, known_as) is None else "")
        if name:
            tag_in(tx, record.id, name, now=now)
        return name or TABLE.get_in(tx, record.id).name

    return await catalog.db.write(run)
