"""What `session send` shows: until the turn that the message went into has ended, whatever else happens before."""

import pytest

from recess.cli.verbs.session import _follow_turn, follow, render
from recess.errors import ServerUnavailable


class Out:
    as_json = False

    def __init__(self):
        self.lines, self.told = [], []

    def line(self, text):
        self.lines.append(text)

    def progress(self, text):
        self.told.append(text)


class Inv:
    """An invocation whose server has this log."""

    def __init__(self, entries):
        self.out, self.server, self._entries = Out(), self, entries

    def call(self, method, path, query):
        assert (method, path) == ("GET", "/v1/sessions/s1/log")
        return {"entries": [e for e in self._entries if e["position"] > query["after"]][: query["limit"]]}

    def events(self, path, *, after):
        for entry in self._entries:
            if entry["position"] > int(after):
                yield "entry", str(entry["position"]), entry
        yield "end", "", {}


def log(*rows):
    return [{"position": i, "kind": kind, "ref": "q1", "body": body} for i, (kind, body) in enumerate(rows, 1)]


BUSY = log(
    ("user", {"text": "one"}), ("turn.start", {"inbox": 1}), ("user", {"text": "two"}), ("user", {"text": "3", "mode": "steer"}),
    ("turn.end", {"status": "done"}), ("turn.start", {"inbox": 3}), ("turn.end", {"status": "failed"}),
)  # fmt: skip


@pytest.mark.parametrize(("position", "status", "last"), [(1, "done", 5), (3, "failed", 7), (4, "done", 5)])
def test_each_message_is_followed_to_the_end_of_its_own_turn(position, status, last):
    assert _follow_turn(Inv(BUSY), "s1", position) == (status, BUSY[position:last])


def test_a_machine_that_does_not_come_up_is_told_of():
    class Troubled(Inv):
        def events(self, path, *, after):
            yield "trouble", "", {"failure": "no such image: bose"}
            yield "trouble", "", {"failure": ""}
            yield from super().events(path, after=after)

    inv = Troubled(BUSY)
    assert _follow_turn(inv, "s1", 1) == ("done", BUSY[1:5])
    (told,) = inv.out.told
    assert "no such image: bose" in told


def test_a_question_says_how_to_answer_it():
    entries = log(
        ("user", {"text": "go"}), ("turn.start", {"inbox": 1}), ("ask", {"text": "sure?", "choices": ["yes", "no"]}),
        ("answer", {"text": "yes"}), ("turn.end", {"status": "done"}),
    )  # fmt: skip
    inv = Inv(entries)
    assert _follow_turn(inv, "s1", 1)[0] == "done"
    assert inv.out.told == ["it waits for an answer: recess session answer s1 q1 TEXT"]
    assert render(entries[2]).endswith("q1: sure? [yes | no]")
    assert render(entries[3]).endswith("q1: yes")


class Flaky:
    """A server whose streams break off; each is asked for with the id that came last."""

    def __init__(self, *streams):
        self.streams, self.asked = list(streams), []

    def events(self, path, *, after=""):
        self.asked.append(after)
        for item in self.streams.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


def test_following_goes_on_by_the_last_id_through_cuts_and_restarts():
    away = ServerUnavailable("no answer")
    server = Flaky(
        [("entry", "4", {"position": 4}), ("delta", "4.1.0.0.ff", {"n": 0})],
        [away],
        [("delta", "4.1.0.1.fe", {"n": 1}), ("entry", "5", {"position": 5}), away],
        [("end", "", {})],
    )
    waited = []
    assert [e["position"] for e in follow(server, "s", 3, pause=waited.append)] == [4, 5]
    assert server.asked == ["3", "4.1.0.0.ff", "4.1.0.0.ff", "5"]
    assert waited[1] > waited[0] == waited[2], "the pauses grow while there is no server, and begin anew with one"


def test_following_gives_up_when_there_is_no_server_for_long():
    server = Flaky(*[[ServerUnavailable("no answer")]] * 20)
    with pytest.raises(ServerUnavailable):
        list(follow(server, "s", 0, pause=lambda _: None))
