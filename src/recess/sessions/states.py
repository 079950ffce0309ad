"""The states of a session and the moves between them: one table, and a guard that says what was illegal and why.

    cold     log only: no machine, no snapshot
    running  a machine runs and this session holds the lease
    parked   the machine is paused in memory, the lease is held
    frozen   a snapshot is stored, no machine, no lease
    closed   ended for good; the log can still be read

A failed turn is no state: the session is what its machine is, and waits for a human (docs/internals/session-states.md).
"""

from __future__ import annotations

from recess.errors import IllegalState

STATES = ("cold", "running", "parked", "frozen", "closed")

MOVES: dict[str, dict[str, str]] = {
    "cold": {"wake": "running", "seed": "frozen", "close": "closed"},
    "running": {"park": "parked", "freeze": "frozen", "fall": "frozen", "drop": "cold", "wake": "running", "close": "closed"},
    "parked": {"unpark": "running", "freeze": "frozen", "fall": "frozen", "drop": "cold", "wake": "running", "close": "closed"},
    "frozen": {"wake": "running", "seed": "frozen", "drop": "cold", "close": "closed"},
    "closed": {},
}  # fmt: skip

WHY = {
    "wake": "bring a machine back (also: take over one whose supervisor died)",
    "park": "pause the idle machine in memory",
    "unpark": "let the paused machine run again",
    "freeze": "store a snapshot and give the memory back",
    "fall": "the machine died and a snapshot exists",
    "drop": "the machine died, or its snapshot is unusable, and nothing is left but the log",
    "seed": "give a fork or a rewound session its snapshot",
    "close": "end it for good",
}


def next_state(state: str, move: str) -> str:
    """Return the state after `move`. Raises IllegalState naming the state, the move and what would be legal."""
    if state not in MOVES:
        raise IllegalState(f"a session is never {state!r}", state=state, move=move)
    found = MOVES[state].get(move)
    if found is None:
        legal = ", ".join(sorted(MOVES[state])) or "nothing: it has ended"
        what = WHY.get(move, "no such move")
        raise IllegalState(
            f"session is {state}: cannot {move} ({what})", hint=f"from {state} it can: {legal}", state=state, move=move
        )
    return found
