"""One note a recovery, with the rung, the snapshot's position and what was lost."""

from recess.contextlog.contract import Entry
from recess.contextlog.recovery_notes import recovery_notes
from recess.contextlog.transcript import messages


def log(*rows):
    return [Entry("ses_a", i, kind, body, 1, "c1", "", 1, "v", 0.0, 1) for i, (kind, body) in enumerate(rows, 1)]


LOST = ("machine.lost", {"why": "the VM was killed"})
CUT = ("turn.cut", {"cause": "crash", "detail": "the machine was gone"})
START = ("turn.start", {"inbox": 1, "attempt": 2})
RESTORE = ("machine.restore", {"rung": 2, "why": "its machine is dead", "position": 4, "head": 9, "stale": True,
                               "lost": "files changed after entry 4"})  # fmt: skip
SAID = ("assistant", {"text": "I see", "tool_calls": []})
PARTIAL = ("assistant", {"text": "I was", "tool_calls": [], "partial": True})


def test_a_death_in_a_turn_is_one_note():
    entries = log(
        ("user", {"text": "go"}), LOST, PARTIAL, ("tool.result", {"output": "lost"}), CUT, RESTORE, START, SAID
    )
    assert recovery_notes(entries) == {
        5: "Your turn was cut (crash): the machine was gone. Your machine was lost: the VM was killed. Your machine was "
        "brought back on rung 2 from its snapshot at entry 4 of the log, which ended at 9. Lost: files changed after entry 4."
    }
    assert [m["text"][:22] for m in messages(entries) if m.get("note")] == ["[recess] Your turn was"]


def test_a_second_crash_before_the_model_spoke_is_the_same_recovery():
    entries = log(CUT, RESTORE, START, LOST, CUT, RESTORE, START)
    (text,) = recovery_notes(entries).values()
    assert text.startswith("Your turn was cut (crash, 2 times, last): the machine was gone")


def test_two_crashes_between_which_the_model_spoke_are_two():
    assert list(recovery_notes(log(CUT, START, SAID, CUT, START, ("tool.start", {}), CUT))) == [0, 3, 6]


def test_the_machine_ran_on():
    ran_on = ("machine.restore", {"rung": 1, "why": "the machine runs on", "position": 9, "head": 9, "stale": False})
    (text,) = recovery_notes(log(CUT, ran_on)).values()
    assert text.endswith("The machine ran on (rung 1).")


def test_a_death_at_rest_is_told_and_a_thaw_is_not():
    thaw = ("machine.restore", {"rung": 2, "position": 4, "head": 4, "stale": False, "why": "frozen"})
    assert recovery_notes(log(thaw)) == {}
    (text,) = recovery_notes(log(LOST, ("user", {"text": "x"}))).values()
    assert text == "Your machine was lost: the VM was killed."


def test_old_entries_without_lost_still_say_it():
    old = ("machine.restore", {"rung": 3, "position": 4, "head": 9, "stale": True, "why": "newest"})
    (text,) = recovery_notes(log(old)).values()
    assert text.endswith("What happened in the machine after that is gone. newest.")


def test_disk_only_and_fresh():
    for rung, words in ((4, "files are kept, processes and memory are gone"), (5, "a fresh one (rung 5)")):
        (text,) = recovery_notes(log(("machine.restore", {"rung": rung, "position": 4, "stale": False}))).values()
        assert words in text
    assert recovery_notes(log(("machine.restore", {"rung": 5, "position": 0, "stale": False}))) == {}


def test_hostile_bodies_do_no_harm():
    odd = {"rung": "x", "why": 7, "lost": ["a"], "stale": True, "position": None, "cause": {}}
    assert recovery_notes(log(("turn.cut", odd), ("machine.lost", odd), ("machine.restore", odd)))
