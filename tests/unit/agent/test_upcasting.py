"""Steps from one schema of an application's own entries to the next: pure, in order, each asked once; what is wrong is told."""

import pytest
from recess_agent import NewerEntry, agent
from recess_agent.upcasting import UpcastError, Upcasters, refuse_newer


def entry(position, schema=1, kind="x.plan", **body):
    return {"position": position, "kind": kind, "body": body, **({"schema": schema} if schema != 1 else {})}


def steps():
    found = Upcasters()
    found.add("x.plan", 2, lambda body: {"steps": [{"text": one, "done": False} for one in body["steps"]]})
    found.add(
        "x.plan", 1, lambda body: {"steps": body["text"].split(",")}
    )  # the order of writing them is nobody's concern
    return found


def test_each_entry_goes_up_from_where_it_was_written():
    old, middle, new = entry(1, text="a,b"), entry(2, schema=2, steps=["c"]), entry(3, schema=3, steps=[])
    log = [old, middle, new, entry(4, kind="x.other", n=1), entry(5, kind="user", text="hi")]
    read = steps().read(log)
    assert read[0] == entry(1, schema=3, steps=[{"text": "a", "done": False}, {"text": "b", "done": False}])
    assert read[1]["body"] == {"steps": [{"text": "c", "done": False}]}
    assert read[2:] == log[2:]
    assert (old["body"], middle["body"]) == ({"text": "a,b"}, {"steps": ["c"]})  # the log's own are as they were


def test_a_step_gets_a_copy_and_is_asked_once_while_the_entry_is_there():
    calls = []

    def step(body):
        calls.append(1)
        body["deep"].append("more")
        return body

    found = Upcasters()
    found.add("note", 1, step)
    log = [entry(1, kind="note", deep=["a"])]
    assert found.read(log)[0]["body"] == {"deep": ["a", "more"]} == found.read(log)[0]["body"]
    assert (log[0]["body"], len(calls)) == ({"deep": ["a"]}, 1)
    assert found.read([]) == []  # compacted away
    found.read(log)
    assert len(calls) == 2


@pytest.mark.parametrize("wrong", [lambda body: body["nothing"], lambda body: None])
def test_a_step_that_fails_says_which_entry(wrong):
    found = Upcasters()
    found.add("x.plan", 1, wrong)
    with pytest.raises(UpcastError, match=r"x\.plan at position 7 cannot go from schema 1 to 2") as caught:
        found.read([entry(7)])
    assert (caught.value.kind, caught.value.position, caught.value.schema) == ("x.plan", 7, 1)


def test_what_newer_code_wrote_is_left_as_it_is_and_marked():
    newer = entry(3, schema=9, whatever=[1])
    assert steps().read([newer]) == [{**newer, "newer": True}]
    assert Upcasters().read([entry(1, schema=2, kind="note")])[0]["newer"] is True
    error = refuse_newer(newer, 3)
    assert isinstance(error, NewerEntry)
    assert "position 3 was written by newer code: schema 9, and this version knows 3" in str(error)


def test_what_cannot_be_a_chain_is_refused():
    found = Upcasters()
    for kind, schema in (("assistant", 1), ("user", 1), ("x.plan", 0)):
        with pytest.raises(ValueError, match="upcast"):
            found.add(kind, schema, dict)
    found.add("x.plan", 2, dict)
    with pytest.raises(ValueError, match="has no step from schema 1 to 2"):
        found.check()
    found.add("x.plan", 1, dict)
    found.check()
    with pytest.raises(ValueError, match="one step from each"):
        found.add("x.plan", 2, dict)
    assert (found.newest("x.plan"), found.newest("note")) == (3, 1)


def test_an_agent_takes_steps_by_a_decorator():
    @agent
    async def me(s):
        pass

    @me.upcast("note", 1)
    def renamed(body):
        return {"name": body["title"]}

    assert renamed({"title": "a"}) == {"name": "a"}  # it stays a function that can be tested
    assert me.upcasters.newest("note") == 2
