"""What the crash matrix knows from outside: the payment provider that counts, the marks by which agent and test meet, and the
account of what must hold afterwards. It must know neither machines nor servers.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from recess.contextlog.branch import on_branch
from recess.contextlog.contract import Entry
from recess.contextlog.transcript import check_transcript, messages
from recess.testing.http_server import HttpRequest, HttpResponse, json_response
from recess.testing.payment_server import PaymentServer

GOING_S = 5.0  # how long the answer to "may I go on?" is kept back


class Marks:
    """Moments inside an agent at which a test strikes: armed by name, hit once, and gone on from when the test says so."""

    def __init__(self) -> None:
        self._armed: set[str] = set()
        self._hit: dict[str, asyncio.Event] = {}
        self._going: dict[str, asyncio.Event] = {}

    def arm(self, name: str) -> None:
        """Let the next agent that comes here stand still."""
        self._armed.add(name)
        self._hit[name], self._going[name] = asyncio.Event(), asyncio.Event()

    async def hit(self, name: str) -> None:
        """Wait until an agent stands here."""
        await self._hit[name].wait()

    def go(self, name: str) -> None:
        """Let it go on."""
        self._going[name].set()

    def struck(self, name: str) -> bool:
        """An agent asks whether to stand still here."""
        if name not in self._armed:
            return False
        self._armed.remove(name)
        self._hit[name].set()
        return True

    async def going(self, name: str) -> bool:
        """An agent that stands here asks whether to go on; answered soon, if only to be asked again."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._going[name].wait(), GOING_S)
        return self._going[name].is_set()


class CountingPayments(PaymentServer):
    """The provider, which also remembers the key of every charge that was asked for, in order. The marks are asked for here, too:
    it is the one address that an agent in a machine can reach."""

    def __init__(self) -> None:
        super().__init__("k")
        self.asked: list[str] = []
        self.marks = Marks()

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Count, then serve."""
        name = request.query.get("name", "")
        if request.path == "/struck":
            return json_response({"struck": self.marks.struck(name)})
        if request.path == "/going":
            return json_response({"going": await self.marks.going(name)})
        if request.method == "POST":
            self.asked.append(request.headers.get("idempotency-key", ""))
        return await super().answer(request)


@dataclass
class Account:
    """What was promised, and whether the log and the payment provider agree. `said`: text -> acknowledged position."""

    said: dict[str, int] = field(default_factory=dict)
    strikes: list[str] = field(default_factory=list)

    def check(self, entries: list[Entry], pay: CountingPayments) -> None:
        """Raise AssertionError with what does not add up."""
        branch = on_branch(entries)
        wrong = check_transcript(messages(entries))
        assert not wrong, f"the transcript is invalid: {wrong}"
        positions = [e.position for e in entries]
        assert positions == list(range(1, len(entries) + 1)), "positions with gaps"
        self._messages(branch, hidden=set(positions) - {e.position for e in branch})
        self._charges(branch, pay)
        self._losses(branch)

    def _messages(self, branch: list[Entry], *, hidden: set[int]) -> None:
        """`hidden`: positions that a rewind took off the branch; nothing else excuses a message that is not there."""
        users = [e for e in branch if e.kind == "user"]
        wanted = {text: at for text, at in self.said.items() if at not in hidden}
        assert {str(e.body["text"]): e.position for e in users} == wanted, "an acknowledged message is lost or doubled"
        turns: dict[int, set[int]] = {}
        for e in branch:
            if e.kind == "turn.start":
                turns.setdefault(int(e.body["inbox"]), set()).add(e.turn)
        ends = [e.turn for e in branch if e.kind == "turn.end"]
        assert len(ends) == len(set(ends)), "a turn has ended twice"
        for user in users:
            mine = turns.get(user.position, set())
            assert len(mine) == 1, f"message {user.position} has the turns {sorted(mine)}"
            assert mine <= set(ends), f"the turn of message {user.position} has not ended"

    def _charges(self, branch: list[Entry], pay: CountingPayments) -> None:
        for text in self.said:
            word, cents = text.split()[0], int(text.rsplit("#", 1)[1]) + 1
            asked = [key for key in pay.asked if pay.charges[key].cents == cents]
            if word in ("charge", "wire"):
                assert len(asked) <= 1, f"`once` ran {len(asked)} times: {text}"
            assert len(set(asked)) <= 1, f"one call, several keys: {text}"
        started = {e.ref: e for e in branch if e.kind == "tool.start"}
        outcomes: dict[str, list[Entry]] = {ref: [] for ref in started}
        for e in branch:
            if e.kind in ("tool.result", "tool.settled", "tool.doubt") and e.ref in outcomes:
                outcomes[e.ref].append(e)
        for ref, found in outcomes.items():
            name = started[ref].body["name"]
            assert len(found) == 1, f"call {ref} ({name}) has the outcomes {[e.kind for e in found]}"
            if name == "charge" and not found[0].body.get("error"):
                assert found[0].kind != "tool.doubt", "`verify` can tell, so there is no doubt"
                cents = started[ref].body["arguments"]["cents"]
                assert any(one.cents == cents for one in pay.charges.values()), (
                    f"charge {cents} is claimed and not made"
                )

    def _losses(self, branch: list[Entry]) -> None:
        """A file that the log says was written is still there when a later turn looks, or a `machine.restore` in between says that
        files are lost."""
        names = {e.ref: str(e.body["arguments"]["name"]) for e in branch if _is_work(e)}
        done = {
            e.ref: e.position for e in branch if e.kind == "tool.result" and not e.body.get("error") and e.ref in names
        }
        restores = [e for e in branch if e.kind == "machine.restore"]
        for e in restores:
            assert e.body["rung"] in (1, 2, 4, 5)
            assert e.body["why"], f"no reason at {e.position}"
            assert bool(e.body.get("lost")) == (bool(e.body["stale"]) or e.body["rung"] == 4), e.body
        losses = [e.position for e in restores if "files" in str(e.body.get("lost", ""))]
        for look in branch:
            if look.kind != "note" or "journal" not in look.body:
                continue
            for ref, at in done.items():
                if at < look.position and names[ref] not in look.body["journal"]:
                    told = any(at < loss < look.position for loss in losses)
                    assert told, f"the file of {names[ref]} is gone at {look.position} and nobody was told"


def _is_work(entry: Entry) -> bool:
    return entry.kind == "tool.start" and entry.body["name"] == "work"
