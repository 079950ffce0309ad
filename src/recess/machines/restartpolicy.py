"""Docker's restart policies, as decisions: whether a main process that has ended is started again, and after how long. Pure.

The waits between grow from 0.1 s to a minute and begin anew once a process has lived for ten seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from recess.errors import InvalidSpec

FIRST_S = 0.1
LONGEST_S = 60.0
SETTLED_S = 10.0
POLICIES = ("", "no", "always", "unless-stopped", "on-failure")


@dataclass(frozen=True)
class Policy:
    """When to start again: `always` whatever the exit code, else after a failure at most `times` (0: without end)."""

    always: bool
    times: int = 0


def parse_policy(text: str) -> Policy | None:
    """Return the policy that Docker's --restart names, None for "no". Raises InvalidSpec."""
    word, colon, count = text.partition(":")
    if word not in POLICIES or (colon and (word != "on-failure" or not count.isdigit())):
        raise InvalidSpec(f"restart: unknown policy {text!r}", hint="no, on-failure[:TIMES], always or unless-stopped")
    if word in ("", "no"):
        return None
    return Policy(word != "on-failure", int(count or 0))


def decide(text: str, code: int, done: int, lived_s: float) -> tuple[int, float] | None:
    """Return (restarts counted, seconds to wait before the next) for a process that ended with `code` after `lived_s`
    seconds and `done` restarts; None: it stays ended."""
    policy = parse_policy(text)
    if policy is None or not (policy.always or code):
        return None
    if policy.times and done >= policy.times:
        return None
    if lived_s >= SETTLED_S and not policy.times:
        done = 0
    return done + 1, min(LONGEST_S, FIRST_S * 2.0 ** min(done, 20))
