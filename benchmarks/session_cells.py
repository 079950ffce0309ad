"""The figures of the session benchmark that every side has: each is measured on a worker that is really killed or stopped.

length   seconds from the start of a new process to its next model call, after SIGKILL of everything at turn N; `replay` is the
         part of it behind "my packages are imported, my server is up". One life of a side is brought to each N in turn
wall     turns in so many seconds from an empty log; the largest tool result that a run still goes on behind, after a kill
card     turns that were charged twice, when the process is killed after the provider counted and before it answered
deploy   runs that were killed in mid-turn and go on under code with one line more
lunch    seconds until a dev server and a dict are there again in a new process (they are redone: a journal has neither)
orphan   model calls with a valid transcript, of those that came first after a kill at a random moment
race     turns charged twice or lost when one worker stands still in a charge, past its lease, while another takes over
fork     seconds and bytes of so many forks at the end of a session
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.session_world import PATIENCE_S, Side, World, side_of, sides_of, transcript_faults

DEPLOY_S = 20.0
LOOK_S = 2.0  # between looks at how far a side has come
ORPHAN_LIFE = 100  # kills
WALL_S = 45.0  # for a large result to be kept and found again


@dataclass(frozen=True)
class Recovered:
    """Seconds to the next model call: from the start of the process, and from its being up."""

    whole: float
    replay: float


def fail(side: Side, what: str) -> RuntimeError:
    """Return the error that a side did not do something, with its last words."""
    return RuntimeError(f"{side.name} did not {what}:\n{side.tail()}")


def reach(side: Side, world: World, what: str, *, patience_s: float = 0.0) -> None:
    """Wait until what is held was reached. Raises RuntimeError."""
    if not world.reached.wait(patience_s or PATIENCE_S):
        raise fail(side, what)


def begin_again(side: Side, world: World, turn: int, patience_s: float, last: int = 0, **more: str) -> Recovered:
    """Start a killed side (of a run to turn `last`, or to this one) again and wait for its next model call."""
    before = len(world.asked)
    world.arm(model=turn)
    began = side.start(last or turn, **more)
    reach(side, world, f"recover at turn {turn - 1}", patience_s=patience_s)
    at = world.asked[before][1]
    return Recovered(at - began, at - world.mark("up", began))


@dataclass(frozen=True)
class Cap:
    """How long a side may work towards a length, and how much it may keep for it."""

    seconds: float
    bytes: float


class Life:
    """One side's run of `last` turns, brought to longer and longer pasts, and killed at the end of each. The first `past` of them
    Recess writes straight into its log."""

    def __init__(self, side: Side, world: World, last: int, past: int) -> None:
        self._side, self._world, self._last, self._past = side, world, last, past
        self._turn = 0

    def grow(self, turns: int, cap: Cap) -> None:
        """Bring it behind turn `turns`, and kill it in the next one's model call. Raises RuntimeError if it ends before, or at the
        cap."""
        world, side = self._world, self._side
        self._turn = turns + 1
        world.arm(model=self._turn)
        began = side.start(self._last, PAST=str(self._past))
        while not world.reached.wait(LOOK_S):
            took, kept = time.monotonic() - began, side.stored()
            if took > cap.seconds or kept > cap.bytes:
                at = max((turn for turn, _ in world.asked), default=0)
                side.kill()
                raise RuntimeError(f"given up at turn {at}, after {took:.0f} s and with {kept / 1e9:.1f} GB kept")
            if not side.running():
                raise fail(side, f"get to turn {turns + 1}")
        side.kill()

    def recover(self) -> Recovered:
        """Start it again where it was killed; let it come one turn farther and kill it there. (Not at the same place again: a turn
        that ends its process time after time is poisoned to some.)"""
        side, world, turn = self._side, self._world, self._turn
        found = begin_again(side, world, turn, PATIENCE_S + turn * 0.05, self._last)
        self._turn += 1
        world.move_on(model=self._turn)
        reach(side, world, f"get to turn {self._turn}", patience_s=PATIENCE_S + turn * 0.05)
        side.kill()
        return found


@contextmanager
def life_of(name: str, python: str, last: int, past: int = 0) -> Iterator[Life]:
    """A fresh side with `last` turns before it."""
    with side_of(name, python) as (side, world):
        yield Life(side, world, last, past)


def lunch(name: str, python: str, entries: int) -> float:
    """Return how long a new process takes until dev server, dict and the run are there again."""
    with side_of(name, python) as (side, world):
        world.arm(model=2)
        side.start(2, LUNCH=str(entries))
        reach(side, world, "get to turn 2")
        side.kill()
        return begin_again(side, world, 2, PATIENCE_S, LUNCH=str(entries)).whole


def turns_in(name: str, python: str, seconds: float) -> int:
    """Return how many turns were charged in so many seconds from the first model call on. Raises RuntimeError if it ended."""
    with side_of(name, python) as (side, world):
        side.start(10**6)
        if not world.wait(lambda: bool(world.asked), PATIENCE_S):
            raise fail(side, "ask the model")
        threading.Event().wait(seconds)
        if not side.running():
            raise fail(side, f"last {seconds} s")
        return sum(world.charges.values())


def takes(name: str, python: str, size: int) -> bool:
    """Tell whether a run goes on behind a tool result of so many bytes, killed there, without asking for it again."""
    with side_of(name, python) as (side, world):
        world.result = "x" * size
        for _ in range(2):
            world.arm(model=2)
            side.start(2)
            if not world.reached.wait(WALL_S):
                return False
            side.kill()
        return world.charges[1] == 1


def card(name: str, python: str, kills: int) -> int:
    """Return how many of so many turns were charged twice."""
    with side_of(name, python) as (side, world):
        for turn in range(1, kills + 1):
            world.arm(pay=turn)
            side.start(kills)
            reach(side, world, f"get to the charge of turn {turn}")
            side.kill()
            world.release()
        side.start(kills)
        if not side.end(PATIENCE_S):
            raise fail(side, "end")
        return sum(world.charges[turn] > 1 for turn in range(1, kills + 1))


def deploy(name: str, python: str) -> bool:
    """Tell whether a run that was killed in turn 3 goes on to its next model call under newer code."""
    with side_of(name, python) as (side, world):
        world.arm(model=3)
        side.start(5)
        reach(side, world, "get to turn 3")
        side.kill()
        world.arm(model=4)
        side.start(5, line=1)
        return world.reached.wait(DEPLOY_S)


def orphan(name: str, python: str, kills: int, at_once: int = 1) -> tuple[int, list[str]]:
    """Kill at random moments of the loop; return how many of the first model calls after a kill had a valid transcript, and what
    was wrong with the others. In lives of at most 100 kills, so many of them `at_once`."""
    lives = [min(ORPHAN_LIFE, kills - before) for before in range(0, kills, ORPHAN_LIFE)]
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda life: _orphans(name, python, life[1], 11 + life[0]), enumerate(lives)))
    return sum(valid for valid, _ in found), [fault for _, faults in found for fault in faults]


def _orphans(name: str, python: str, kills: int, seed: int) -> tuple[int, list[str]]:
    """One life of `orphan`."""
    draw = random.Random(seed)
    faults: list[str] = []
    valid = 0
    with side_of(name, python) as (side, world):
        side.start(10**6, FULL="1")
        for _ in range(kills):
            wanted = world.seen() + draw.randrange(1, 8)
            if not world.wait(lambda wanted=wanted: world.seen() >= wanted, PATIENCE_S):  # type: ignore[misc]
                raise fail(side, "go on")
            time.sleep(draw.uniform(0, 0.05))
            side.kill()
            world.transcripts.clear()  # a long life's would fill the memory
            side.start(10**6, FULL="1")
            if not world.wait(lambda: bool(world.transcripts), PATIENCE_S):
                raise fail(side, "recover")
            turn, messages = world.transcripts[0]
            found = transcript_faults(messages, turn)
            faults += found[:1]
            valid += not found
    return valid, faults


def race(name: str, python: str, database: str, turns: int = 4) -> tuple[int, int]:
    """Stop one worker inside its charge of turn 2, let another finish, let the first go on. Return the turns that were charged more
    than once, and those that were not charged."""
    with sides_of(name, python, "a", "b") as (sides, world):
        first, second = sides
        more = {"DATABASE_URL": database, "SHARED": str(first.shared)}
        world.arm(pay=2)
        first.start(turns, **more)
        reach(first, world, "get to its charge")
        first.signal(signal.SIGSTOP)
        world.release()
        second.start(turns, **more)
        try:
            if not second.end(PATIENCE_S):
                raise fail(second, "finish what the other began")
        finally:
            first.signal(signal.SIGCONT)
        if not first.end(PATIENCE_S):
            raise fail(first, "end after it stood still")
        every = range(1, turns + 1)
        return sum(world.charges[turn] > 1 for turn in every), sum(world.charges[turn] == 0 for turn in every)


def fork(name: str, python: str, turns: int, forks: int) -> dict[str, Any]:
    """Return the seconds and the bytes of so many forks at the end of a session of so many turns."""
    with side_of(name, python) as (side, world):
        side.start(turns, FORKS=str(forks))
        if not world.wait(lambda: any(told == "forked" for told, _, _ in world.marks), PATIENCE_S + turns * 0.5):
            raise fail(side, "fork")
        return dict(next(value for told, _, value in world.marks if told == "forked"))
