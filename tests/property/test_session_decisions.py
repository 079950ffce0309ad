"""Every view has one legal move, and the whole machine of decisions and states never gets stuck or does harm."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recess.errors import IllegalState
from recess.sessions.decisions import (
    ATTEMPTS_MAX,
    Act,
    Contracts,
    Rung,
    View,
    decide,
    keeper_deadline_s,
    keeps_agent,
    plan_wake,
    snapshot_for,
    speaks,
    upgrade_target,
)
from recess.sessions.states import MOVES, STATES, next_state

SECONDS = st.sampled_from([0.0, 0.1, 5.0, 30.0, 100.0])
VIEWS = st.builds(
    View, state=st.sampled_from(["running", "parked"]), machine_alive=st.booleans(), agent_alive=st.booleans(),
    agent_failed=st.booleans(),
    agent_ended=st.booleans(), waiting=st.booleans(), done=st.integers(0, 4), turn=st.integers(0, 4),
    turn_open=st.booleans(), turn_cut=st.booleans(), cuts=st.integers(0, 4), calls_open=st.integers(0, 2),
    inbox=st.booleans(), holds=st.integers(0, 2), idle_s=SECONDS, idle_timeout_s=SECONDS, park_s=SECONDS,
    suspend_wanted=st.booleans(), freeze_blocked_s=SECONDS, upgrade_to=st.sampled_from(["", "v2"]),
    policy=st.sampled_from(["pin", "turn", "now", "contract"]), cancel=st.booleans(), cancel_told=st.booleans(), cancel_s=SECONDS,
    resting=st.booleans(), ready=st.booleans(), due_s=st.one_of(st.none(), st.sampled_from([0.001, 30.0, 900.0])),
    rest_s=SECONDS, due_near_s=SECONDS, snapshot_in_s=st.one_of(st.none(), SECONDS),
    by_hand=st.booleans(), oom=st.booleans(), may_grow=st.booleans(),
    limit_in_s=st.one_of(st.none(), st.sampled_from([0.001, 30.0])),
)  # fmt: skip


@settings(max_examples=2000, deadline=None)
@given(VIEWS)
def test_decide_keeps_its_promises(view):
    move = decide(view)
    assert move.why
    if not view.machine_alive:
        assert move.act is Act.RECOVER
        return
    if move.act in (Act.FREEZE, Act.PARK):
        assert not view.inbox or view.turn_open or view.by_hand, "a message must never be frozen over"
        assert not view.cancel
        assert not (view.holds and not view.suspend_wanted)
        if view.turn_open and view.state == "running":
            assert move.act is Act.FREEZE
            assert view.resting, "an agent at work must not be put away"
            assert not view.ready, "nor one whose wait is over"
            assert not view.calls_open
            assert not view.waiting
    if move.act is Act.PARK:
        assert not view.turn_open
        assert view.idle_s >= view.idle_timeout_s
    if move.act is Act.SNAPSHOT:
        assert view.snapshot_in_s == 0.0
        assert view.freeze_blocked_s == 0.0, "the store has just refused one"
        assert view.state == "running"
        assert not view.cancel
    if move.act is Act.START_TURN:
        assert view.inbox or view.cancel
        assert not view.turn_open
        assert view.waiting or view.agent_failed or view.cancel
    if move.act in (Act.TELL_CANCEL, Act.CANCEL_TURN):
        assert view.cancel
        assert view.turn_open
    if move.act is Act.TELL_CANCEL:
        assert not view.cancel_told, "telling it again would spin"
    if move.act is Act.ANSWER:
        assert view.ready
        assert view.resting
    if move.act is Act.REDELIVER:
        assert view.turn_open
        assert view.cuts < ATTEMPTS_MAX
    if move.act in (Act.UPGRADE, Act.CUT_FOR_UPGRADE):
        assert view.upgrade_to
        assert view.policy != "pin"
    if move.act is Act.UPGRADE:
        assert not view.turn_open
    if move.act is Act.WAIT and move.seconds is not None:
        assert move.seconds > 0, "a wait of nothing would spin"
    if ((view.inbox and not view.by_hand) or view.turn_open or view.cancel) and view.state == "parked":
        assert move.act is Act.UNPARK
    if move.act is Act.GROW:
        assert view.turn_open
        assert view.turn_cut
        assert view.oom
        assert view.may_grow
    if view.by_hand and not view.turn_open and not view.cancel:
        assert move.act not in (Act.START_TURN, Act.RESTART_AGENT, Act.UPGRADE), "the session is a human's now"
    if view.oom and not view.may_grow and view.turn_open and view.turn_cut:
        assert move.act is not Act.RESTART_AGENT, "the same once more would end the same"


@given(
    state=st.sampled_from(STATES), machine_state=st.sampled_from(["", "running", "paused", "suspended", "dead", "exited"]),
    machine_epoch=st.integers(0, 3), epoch_before=st.integers(0, 3), snapshot=st.sampled_from(["", "s1", "s2"]),
    machine_snapshot=st.sampled_from(["", "s1", "s2"]), older=st.lists(st.sampled_from(["s1", "s2", "s3"]), max_size=3),
)  # fmt: skip
def test_every_plan_ends_in_a_machine(
    state, machine_state, machine_epoch, epoch_before, snapshot, machine_snapshot, older
):
    plan = plan_wake(
        state=state, machine_state=machine_state, machine_snapshot=machine_snapshot, machine_epoch=machine_epoch,
        epoch_before=epoch_before, snapshot=snapshot, older_snapshots=older,
    )  # fmt: skip
    assert plan.steps[-1] == (Rung.CREATE, "")
    assert plan.why
    assert len(set(plan.steps)) == len(plan.steps)
    rungs = [rung for rung, _ in plan.steps]
    disks = [one for rung, one in plan.steps if rung is Rung.DISK]
    assert disks == ([""] if machine_state else list(plan.disks)), "the machine's own, or each stored snapshot's"
    assert not plan.own_disk or machine_epoch == epoch_before, (
        "a disk that another owner has overtaken is not the newest"
    )
    order = [Rung.REATTACH, Rung.UNPAUSE, Rung.RESUME, Rung.RESTORE, Rung.DISK, Rung.CREATE]
    assert rungs == sorted(rungs, key=order.index), "the warmest first"
    if plan.steps[0][0] in (Rung.REATTACH, Rung.UNPAUSE):
        assert machine_epoch == epoch_before, "a machine that another owner has overtaken must not go on"
    elif machine_state in ("running", "paused"):
        assert plan.kill_first


@given(
    st.lists(
        st.tuples(st.sampled_from(STATES), st.sampled_from(sorted({m for row in MOVES.values() for m in row}))),
        max_size=20,
    )
)
def test_the_table_says_what_is_illegal_and_why(pairs):
    for state, move in pairs:
        if move in MOVES[state]:
            assert next_state(state, move) in STATES
        else:
            with pytest.raises(IllegalState, match=f"session is {state}: cannot {move}"):
                next_state(state, move)


def test_closed_is_the_end_and_reachable_from_everywhere():
    assert MOVES["closed"] == {}
    assert all("close" in MOVES[state] for state in STATES if state != "closed")


def test_small_decisions():
    needed, any_code, too_new = Contracts(2, 1, 2), Contracts(1, 1, 2), Contracts(3, 1, 2)
    for contracts in (needed, any_code, too_new):
        assert upgrade_target("a", "b", "turn", contracts) == "b"
        assert upgrade_target("a", "b", "pin", contracts) == upgrade_target("a", "a", "now", contracts) == ""
    assert [upgrade_target("a", "b", "contract", one) for one in (needed, any_code, too_new)] == ["b", "", ""]
    assert [speaks("contract", one) for one in (needed, any_code, too_new)] == [True, True, False]
    assert [speaks("pin", one) for one in (needed, any_code, too_new)] == [False, True, False]
    assert snapshot_for(10, [("s1", 4), ("s2", 9), ("s3", 12)]) == ("s2", 9)
    assert snapshot_for(3, [("s1", 4)]) == ("", 0)
    assert keeper_deadline_s(15.0, margin_s=2.0, embedded=False, orphan_s=600.0) == 13.0
    assert keeper_deadline_s(15.0, margin_s=2.0, embedded=True, orphan_s=600.0) == 600.0
    assert keeper_deadline_s(1.0, margin_s=2.0, embedded=False, orphan_s=0.0) == 0.0


def test_an_agent_goes_on_only_when_its_memory_is_the_logs():
    same = {"snapshot_position": 10, "turn_open": False, "turn_started": 0}
    assert keeps_agent(Rung.RESUME, last_work=10, **same)
    assert not keeps_agent(Rung.RESUME, last_work=11, **same)
    assert not keeps_agent(Rung.CREATE, last_work=0, **same)
    assert keeps_agent(Rung.REATTACH, last_work=99, **same)
    assert not keeps_agent(Rung.RESTORE, snapshot_position=10, last_work=9, turn_open=True, turn_started=5)
    assert keeps_agent(Rung.RESTORE, snapshot_position=10, last_work=9, turn_open=True, turn_started=12)
    resting = {"snapshot_position": 10, "last_work": 9, "turn_open": True, "turn_started": 5}
    assert keeps_agent(Rung.RESUME, at="wait", **resting)
    assert not keeps_agent(Rung.RESUME, at="work", **resting)
    assert not keeps_agent(Rung.RESUME, at="wait", **{**resting, "last_work": 11})
    assert not keeps_agent(Rung.RESUME, at="wait", **{**resting, "turn_started": 12})
    assert not keeps_agent(Rung.RESUME, at="work", last_work=10, **same)  # a fork in the middle of the parent's turn
