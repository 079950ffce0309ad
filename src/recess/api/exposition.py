"""Metrics as Prometheus reads them: text exposition format 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats/). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from recess.sessions.counters import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

HELP: Mapping[str, str] = {
    "recess_info": "The server: its version and driver.",
    "recess_sessions": "Sessions by state.",
    "recess_sessions_live": "Sessions that this server drives now.",
    "recess_machines": "Machines by state.",
    "recess_snapshots": "Stored snapshots.",
    "recess_disk_free_bytes": "Room on the disk that snapshots are stored on.",
    "recess_store_read_bytes_total": "Bytes read from the blob store.",
    "recess_store_written_bytes_total": "Bytes written to the blob store.",
    "recess_session_claims_total": "Sessions taken up by this server.",
    "recess_log_entries_total": "Owner entries appended to context logs, by kind.",
    "recess_turns_total": "Turns that have ended, by status.",
    "recess_turn_cuts_total": "Attempts of turns that were cut, by cause.",
    "recess_tool_calls_total": "Tool calls begun, by tool.",
    "recess_session_snapshots_total": "Snapshots of sessions; away: their machine was put away with it.",
    "recess_snapshot_stored_bytes_total": "Bytes that snapshots added to the store.",
    "recess_snapshot_standstill_seconds_total": "Time in which machines stood still for a snapshot.",
    "recess_snapshot_cpu_seconds_total": "Processor time of comparing and compressing snapshots.",
    "recess_thaws_total": "Machines of sessions brought back, by rung of the ladder.",
    "recess_thaw_seconds_total": "Time taken by that, by rung.",
    "recess_thaw_read_bytes_total": "Bytes read to bring machines back.",
    "recess_machines_lost_total": "Machines of sessions that died without anybody having asked.",
}


def expose(samples: Iterable[Sample]) -> str:
    """Return the text. Samples of one name stand together; a name without a help line is a defect (KeyError)."""
    by_name: dict[str, list[Sample]] = {}
    for one in samples:
        by_name.setdefault(one.name, []).append(one)
    lines = []
    for name in sorted(by_name):
        lines.append(f"# HELP {name} {HELP[name]}")
        lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
        for one in by_name[name]:
            labels = ",".join(f'{label}="{_escaped(text)}"' for label, text in one.labels)
            lines.append(f"{name}{{{labels}}} {_number(one.value)}" if labels else f"{name} {_number(one.value)}")
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
