"""What `session send` shows: until the turn that the message went into has ended, whatever else happens before."""

import pytest

from recess.cli.verbs.session import _follow_turn, render


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
