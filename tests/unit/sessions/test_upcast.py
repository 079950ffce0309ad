"""An agent's own entries over deploys: newer code reads older shapes, older code after a rollback is told what it cannot read."""

import json
from pathlib import Path

from recess.testing.session_world import notes, texts, world

GOLDEN = Path(__file__).parents[2] / "golden" / "own_entries_v1.json"

HEAD = """
from recess_agent import NewerEntry, agent
from recess_agent.records import Records

@agent(image="base", idle="60s")
async def planner(s):
    plans = Records(s, "plan")
    async for turn in s:
        try:
            if turn.text:
                await plans.add(**MAKE(turn.text))
            await s.say(repr([{k: v for k, v in one.items() if k != "attempt"} for one in plans.all(newer="NEWER")]))
        except NewerEntry as exc:
            await s.say(str(exc))
        await s.note(schemas=[one.get("schema", 1) for one in s.log if one["kind"] == "x.plan"],
                     newer=[one["position"] for one in s.log if one.get("newer")])
"""
ONE = HEAD + "\ndef MAKE(text): return {'text': text}\n"
TWO = (
    HEAD
    + """
def MAKE(text): return {'steps': text.split(',')}

@planner.upcast("x.plan", 1)
def steps(body):
    return {"steps": body["text"].split(","), "attempt": body["attempt"]}
"""
)
THREE = (
    TWO.replace("{'steps': text.split(',')}", "{'steps': [{'text': one} for one in text.split(',')]}")
    + """
@planner.upcast("x.plan", 2)
def objects(body):
    return {**body, "steps": [{"text": one} for one in body["steps"]]}
"""
)


def code(source, newer="raise"):
    return {"agent.py": source.replace('"NEWER"', repr(newer))}


async def told(w, s, text, turn):
    await w.sessions.send(s, text, key=f"m{turn}")
    await w.until(s, "turn.end", count=turn)
    return texts(await w.entries(s))[-1]


async def test_newer_code_reads_older_entries_and_the_log_stays(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("planner", code(ONE))
        s = (await w.sessions.start("planner")).id
        assert await told(w, s, "a,b", 1) == "[{'text': 'a,b'}]"
        written = [dict(e.body) for e in await w.entries(s, "x.plan")]
        await w.sessions.deploy("planner", code(TWO))
        assert await told(w, s, "c", 2) == "[{'steps': ['a', 'b']}, {'steps': ['c']}]"
        await w.sessions.deploy("planner", code(THREE))
        assert await told(w, s, "d", 3) == (
            "[{'steps': [{'text': 'a'}, {'text': 'b'}]}, {'steps': [{'text': 'c'}]}, {'steps': [{'text': 'd'}]}]"
        )
        log = await w.entries(s, "x.plan")
        assert [e.schema for e in log] == [1, 2, 3]
        assert [dict(e.body) for e in log][:1] == written
        assert notes(await w.entries(s))[-1]["schemas"] == [3, 3, 3]


async def test_after_a_rollback_newer_entries_are_a_clear_error_or_left_out(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("planner", code(ONE))
        s = (await w.sessions.start("planner")).id
        await told(w, s, "a", 1)
        await w.sessions.deploy("planner", code(TWO))
        await told(w, s, "b", 2)
        await w.sessions.deploy("planner", code(ONE))
        (newer,) = [e.position for e in await w.entries(s, "x.plan") if e.schema == 2]
        assert await told(w, s, "c", 3) == (
            f"x.plan at position {newer} was written by newer code: schema 2, and this version knows 1. Deploy that code "
            "again, or read with newer='skip'"
        )
        said = notes(await w.entries(s))[-1]
        assert (said["schemas"], said["newer"]) == ([1, 2, 1], [newer])  # the log itself is readable
        await w.sessions.deploy("planner", code(ONE, "skip"))
        assert await told(w, s, "d", 4) == "[{'text': 'a'}, {'text': 'c'}, {'text': 'd'}]"
        await w.sessions.deploy("planner", code(TWO))
        assert (
            await told(w, s, "e", 5)
            == "[{'steps': ['a']}, {'steps': ['b']}, {'steps': ['c']}, {'steps': ['d']}, {'steps': ['e']}]"
        )


async def test_a_step_is_missing(tmp_path):
    async with world(idle_timeout_s=60.0) as w:
        await w.sessions.deploy("planner", code(TWO.replace('"x.plan", 1)', '"x.plan", 2)')))
        s = (await w.sessions.start("planner")).id
        await w.sessions.send(s, "a", key="m1")
        end = await w.until(s, "turn.end")
        assert end.body["status"] == "failed"
        assert "has no step from schema 1 to 2" in str(end.body)


def test_entries_of_each_schema_read_as_one_shape():
    """Entries of every schema that an application has had, as a log gives them; written once, never regenerated."""
    space: dict = {}
    exec(compile(THREE.replace('"NEWER"', "'raise'"), "agent.py", "exec"), space)
    recorded = json.loads(GOLDEN.read_text())
    read = space["planner"].upcasters.read(recorded["entries"])
    assert [{k: v for k, v in one["body"].items() if k != "attempt"} for one in read] == recorded["as_schema_3"]
    assert [one["schema"] for one in read] == [3] * len(read)
