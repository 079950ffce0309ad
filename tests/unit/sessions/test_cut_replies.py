"""`on_cut_reply`: what the model sees of a reply that was cut, by a model that went away, by a crash in the stream, by one in the hook."""

import pytest

from recess.contextlog.transcript import messages
from recess.testing.session_agents import MARKS
from recess.testing.session_world import World, appears, machine_of, world

AGENT = (
    MARKS
    + """
import asyncio
from recess_agent import agent

async def model(s, how):
    seen = s.messages()
    if any(m["role"] == "assistant" for m in seen) or (SHARED / "asked").exists():
        yield "seen " + " / ".join(m["content"] for m in seen if m["role"] == "assistant" or "Go on" in m["content"])
        return
    mark("asked")
    yield "half a "
    if how == "raise":
        await asyncio.sleep(0.1)
        raise RuntimeError("the model went away")
    await asyncio.sleep(600)

@agent(image="base", idle="150ms")
async def me(s):
    async for turn in s:
        how, _, _ = turn.text.partition(" ")
        try:
            await s.stream(model(s, how))
        except RuntimeError:
            await s.stream(model(s, how))

@me.on_cut_reply
async def repair(cut):
    mark("why", cut.why + ": " + cut.text)
    if os.environ["WAY"] == "die" and not (SHARED / "died").exists():
        mark("died")
        os._exit(3)
    if os.environ["WAY"] == "fail":
        raise ValueError("of the hook")
    return {"keep": None, "drop": cut.drop(), "die": cut.drop(), "rewrite": cut.rewrite("a half"), "go_on": cut.go_on(), "odd": 7}[os.environ["WAY"]]
"""
)

GO_ON = "seen half a  / [recess] Your reply was cut off there. Go on exactly where it ends; repeat nothing."
WAYS = {
    "keep": "seen half a ",
    "drop": "seen ",
    "rewrite": "seen a half",
    "go_on": GO_ON,
    "odd": "seen half a ",
    "fail": "seen half a ",
}


async def _started(w: World, tmp_path, way: str) -> str:
    await w.sessions.deploy("me", {"agent.py": AGENT}, {"env": {"SHARED": str(tmp_path), "WAY": way}})
    return (await w.sessions.start("me")).id


async def _ended(w: World, s: str, tmp_path) -> list:
    await w.until(s, "turn.end")
    log = await w.entries(s)
    assert [e.body["status"] for e in log if e.kind == "turn.end"] == ["done"]
    (half,) = [e for e in log if e.kind == "assistant" and e.body.get("partial")]
    assert half.body["text"] == "half a ", "the log keeps what was said"
    return log


def _last(log: list) -> str:
    return [e.body["text"] for e in log if e.kind == "assistant"][-1]


@pytest.mark.parametrize("way", WAYS)
async def test_a_model_that_goes_away(tmp_path, way):
    async with world() as w:
        s = await _started(w, tmp_path, way)
        await w.sessions.send(s, "raise")
        log = await _ended(w, s, tmp_path)
        assert _last(log) == WAYS[way]
        assert (tmp_path / "why").read_text() == "the model went away: half a \n"
        stands = [e.body for e in log if "replaces" in e.body]
        assert len(stands) == (way in ("drop", "rewrite", "go_on"))
        assert all(m["text"] != "half a " for m in messages(log)) == (way in ("drop", "rewrite"))


@pytest.mark.parametrize("way", ["keep", "drop", "rewrite", "go_on"])
async def test_an_agent_that_is_killed_while_it_streams(tmp_path, way):
    async with world() as w:
        s = await _started(w, tmp_path, way)
        await w.sessions.send(s, "hang")
        while not await w.log.deltas(s):
            await w.log.wait(s, (await w.log.get(s)).head, 0.05)
        w.machines.end_processes(await machine_of(w, s))
        log = await _ended(w, s, tmp_path)
        assert _last(log) == WAYS[way]
        assert (tmp_path / "why").read_text() == "crash: half a \n"
        note = [m["text"] for m in messages(log) if m.get("note") and "Your turn was cut" in m["text"]]
        assert len(note) == 1, "the model is told all the same, once"


async def test_a_crash_in_the_hook_asks_it_again(tmp_path):
    async with world() as w:
        s = await _started(w, tmp_path, "die")
        await w.sessions.send(s, "raise")
        await appears(tmp_path / "died")
        log = await _ended(w, s, tmp_path)
        assert _last(log) == WAYS["drop"]
        assert (tmp_path / "why").read_text() == "the model went away: half a \ncrash: half a \n"
        (stands,) = [e.body for e in log if "replaces" in e.body]
        assert stands["text"] == ""


async def test_a_hook_is_not_asked_for_what_it_has_mended(tmp_path):
    async with world() as w:
        s = await _started(w, tmp_path, "rewrite")
        await w.sessions.send(s, "raise")
        await _ended(w, s, tmp_path)
        await w.say(s, "again", turn=2)
        log = await w.entries(s)
        assert _last(log) == "seen a half / seen a half"
        assert len((tmp_path / "why").read_text().splitlines()) == 1
