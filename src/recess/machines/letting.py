"""Changing what a machine may reach while it lives: its row first, then the broker. A call that is open runs on under the
rules it was allowed by; the next one is judged by the new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recess.broker import parse_rule
from recess.errors import NotFound
from recess.machines.fleet import Fleet
from recess.machines.parts import Parts
from recess.machines.records import machine_row, spec_from_json, spec_to_json
from recess.machines.service import MachineRow, MachineSpec
from recess.machines.trust import policy_of


def changed(spec: MachineSpec, add: Sequence[str], remove: Sequence[str]) -> MachineSpec:
    """Return a spec with other rules. Raises BadInput (no rule), NotFound (nothing like it to take away)."""
    rules = list(dict.fromkeys([*spec.allow, *(parse_rule(text).text for text in add)]))
    for text in remove:
        if text.strip() not in rules:
            raise NotFound(f"no rule {text[:80]!r} to take away", hint=f"its rules: {', '.join(rules) or 'none'}")
        rules.remove(text.strip())
    after = replace(spec, allow=tuple(rules))
    policy_of(after)
    return after


async def change_egress(
    parts: Parts, fleet: Fleet, ref: str, *, add: Sequence[str], remove: Sequence[str]
) -> MachineRow:  # fmt: skip
    """Add and take away allow rules of a machine in whatever state. Raises NotFound, BadInput; nothing was changed."""
    record = await parts.catalog.machines.get(ref)
    async with fleet.lock(record.id):
        record = await parts.catalog.machines.get(record.id)
        spec = changed(spec_from_json(record.spec, f"machine {record.id}"), add, remove)
        record = await parts.catalog.machines.update(record.id, spec=spec_to_json(spec))
        live = fleet.find(record.id)
        if live is not None:
            live.spec = spec
            if parts.egress is not None and spec.network != "none":
                parts.egress.register(live.id, live.epoch, policy_of(spec))
    return machine_row(record)
