"""An agent that speaks the protocol itself: whatever it claims to be, what it appends is its own session's, and kinds that are not an
agent's are refused."""

from recess.testing.session_world import world

AGENT = """
from recess_agent import agent

@agent(image="base", idle="60s")
async def forger(s):
    async for turn in s:
        said = []
        for kind in ("note", "user", "answer", "turn.end", "code", "machine.restore"):
            claims = {"session": turn.text, "ses": turn.text, "epoch": 99, "owner": "me", "position": 1, "code_version": "forged"}
            body = {"text": "forged", **claims}
            try:
                done = await s._wire.request(
                    "append", kind=kind, body=body, ref="", turn=turn.number, serial="", key="user-1", **claims)
                said.append(kind)
            except Exception as exc:
                pass
        await s.note(accepted=said)
"""


async def test_what_it_claims_to_be_is_not_read(tmp_path):
    async with world() as w:
        await w.sessions.deploy("forger", {"agent.py": AGENT})
        other = (await w.sessions.start("forger")).id
        before = await w.log.get(other)
        mine = (await w.sessions.start("forger")).id
        log = await w.say(mine, other, turn=1)
        assert [e.body["accepted"] for e in log if e.kind == "note" and "accepted" in e.body] == [["note"]]
        (forged,) = [e for e in log if e.body.get("text") == "forged"]
        row = await w.log.get(mine)
        assert (forged.session, forged.epoch, forged.code_version) == (mine, row.epoch, row.code_version)
        assert forged.position > 1
        after = await w.log.get(other)
        assert (after.head, after.epoch, after.owner) == (before.head, before.epoch, before.owner)
        assert await w.entries(other) == []
