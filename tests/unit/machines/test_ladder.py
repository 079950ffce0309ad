"""The ladder's decision: which rungs are tried, in which order, and which failures lead down."""

from __future__ import annotations

import pytest

from recess.errors import all_errors
from recess.machines.ladder import Remains, Step, Way, falls, plan

ALL = frozenset({1, 2, 3, 4})
MEMORY_A, MEMORY_B = Step(Way.MEMORY, "a"), Step(Way.MEMORY, "b")
DISK_A, DISK_B, OWN = Step(Way.SNAPSHOT_DISK, "a"), Step(Way.SNAPSHOT_DISK, "b"), Step(Way.OWN_DISK)


@pytest.mark.parametrize(
    ("remains", "rungs", "steps"),
    [
        (Remains("paused", ("a",), True), ALL, (Step(Way.UNPAUSE),)),
        (Remains("paused", ("a",), True), ALL - {1}, ()),
        (Remains("suspended", ("a", "b"), True), ALL, (MEMORY_A, MEMORY_B, OWN, DISK_A, DISK_B)),
        (Remains("suspended", ("a",), False), ALL, (MEMORY_A, DISK_A)),
        (Remains("suspended", ("a",), True), frozenset({3}), (MEMORY_A,)),
        (Remains("suspended", ("a",), True), frozenset({4}), (OWN, DISK_A)),
        (Remains("dead", (), True), ALL, (OWN,)),
        (Remains("dead", (), False), ALL, ()),
        (Remains("exited", (), True), frozenset({1, 2, 3}), ()),
    ],
)
def test_plan(remains, rungs, steps):
    assert plan(remains, rungs) == steps


def test_only_what_can_never_work_leads_down():
    lead_down = {cls.code for cls in all_errors() if falls(cls("x"))}
    assert lead_down == {"corrupt", "not_found", "incompatible", "unsupported"}
