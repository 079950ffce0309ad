"""Can this snapshot run on this node? A pure question with an answer in words. Snapshots are perishable; logs are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_EXACT = {
    "driver": "driver",
    "driver_version": "version",  # the microvm machine has no stable device state across QEMU versions
    "accelerator": "accelerator",  # KVM and TCG save different CPU state
    "cpu_model": "CPU model",
    "machine_type": "machine type",
    "kernel_hash": "kernel",
}


def can_restore(manifest: Mapping[str, Any], node: Mapping[str, Any]) -> list[str]:
    """Return why a memory snapshot with this fingerprint cannot be restored on a node with that one; [] if it can.

    Both are `Fingerprint` as JSON data. Everything must be equal, except that a node may have more CPU flags.
    """
    reasons = [
        f"{words} is {manifest.get(field)!r} in the snapshot, {node.get(field)!r} here"
        for field, words in _EXACT.items()
        if manifest.get(field) != node.get(field)
    ]
    missing = sorted(set(_flags(manifest)) - set(_flags(node)))
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        reasons.append(f"this CPU lacks {shown}")
    return reasons


def _flags(fingerprint: Mapping[str, Any]) -> list[str]:
    flags = fingerprint.get("cpu_flags", [])
    return [str(flag) for flag in flags] if isinstance(flags, list | tuple) else []
