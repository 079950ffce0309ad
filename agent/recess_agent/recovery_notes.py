"""What the model is told after a crash: one note a recovery, with what was lost, the rung and the snapshot's position.

Pure; the host's copy is `recess.contextlog.recovery_notes`, and a property test holds the two equal on any log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One entry of the log, as far as a transcript needs it."""

    session: str
    position: int
    kind: str
    body: Mapping[str, Any]
    ref: str


RECOVERY_KINDS = frozenset({"turn.cut", "machine.lost", "machine.restore"})
_WENT_ON = frozenset({"user", "answer", "tool.start", "turn.end", "compact", "fork", "rewind"})


def recovery_notes(entries: Sequence[Entry]) -> dict[int, str]:
    """Return what the model is told of each recovery: index of its last entry -> one text ("" ones left out).

    A recovery is a run of `turn.cut`, `machine.lost` and `machine.restore` in which nothing else happened: settled calls, a
    partial reply and further attempts that came to nothing do not end it, so that a crash in a recovery is no second note.
    """
    notes: dict[int, str] = {}
    run: list[Entry] = []
    last = -1
    for i, entry in enumerate(entries):
        if entry.kind in RECOVERY_KINDS:
            run.append(entry)
            last = i
        elif run and _ends(entry):
            notes[last] = _told(run)
            run = []
    if run:
        notes[last] = _told(run)
    return {i: text for i, text in notes.items() if text}


def _ends(entry: Entry) -> bool:
    return entry.kind in _WENT_ON or (entry.kind == "assistant" and entry.body.get("partial") is not True)


def _told(run: Sequence[Entry]) -> str:
    cuts = [e.body for e in run if e.kind == "turn.cut"]
    losses = [e.body for e in run if e.kind == "machine.lost"]
    restores = [e.body for e in run if e.kind == "machine.restore"]
    parts: list[str] = []
    if cuts:
        times = f", {len(cuts)} times, last" if len(cuts) > 1 else ""
        parts.append(
            _joined(f"Your turn was cut ({_word(cuts[-1], 'cause') or 'crash'}{times})", _word(cuts[-1], "detail"))
        )
    if losses:
        parts.append(_joined("Your machine was lost", _word(losses[-1], "why")))
    if restores:
        parts += _restored(restores[-1], told_already=bool(parts))
    lost = [text for body in (*losses, *restores[-1:]) if (text := _word(body, "lost"))]
    if lost and parts:
        parts.append("Lost: " + "; ".join(dict.fromkeys(one.rstrip(". ") for one in lost)))
    return ". ".join(one.rstrip(". ") for one in parts) + "." if parts else ""


def _restored(body: Mapping[str, Any], *, told_already: bool) -> list[str]:
    """Say on which rung the machine came back. A first start and a thaw that lost nothing are worth no word of their own."""
    rung, position, head = body.get("rung"), body.get("position"), body.get("head")
    late = isinstance(rung, int) and rung >= 4
    if not (told_already or body.get("stale") is True or (late and position)):
        return []
    if rung == 1:
        what = ["The machine ran on (rung 1)"]
    elif rung == 4:
        what = [
            f"Your machine was booted again from its disk of entry {position} (rung 4): files are kept, processes and memory are gone"
        ]
    elif rung == 5:
        what = ["Your machine is a fresh one (rung 5): files, processes and memory of the old one are gone"]
    else:
        what = [
            f"Your machine was brought back on rung {rung} from its snapshot at entry {position} of the log, which "
            f"ended at {head}"
        ]
        if body.get("stale") is True and not _word(body, "lost"):
            what.append("What happened in the machine after that is gone")
    return what if told_already else [*what, why] if (why := _word(body, "why")) else what


def _joined(first: str, more: str) -> str:
    return f"{first}: {more.rstrip('. ')}" if more else first


def _word(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    return value if isinstance(value, str) else ""
