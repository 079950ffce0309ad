import pytest

from recess.cli.entry_lines import render


def line(kind, body, ref=""):
    return render({"position": 7, "kind": kind, "ref": ref, "body": body})


RESTORE = {"rung": 2, "seconds": 0.2756, "why": "frozen", "position": 6, "head": 6, "stale": False}
FIGURES = {"durable_s": 0.148, "new_bytes": 982_300, "pages_new": {}}


@pytest.mark.parametrize(
    ("kind", "body", "text"),
    [
        ("user", {"text": "hi\nthere"}, "hi\n                        there"),
        ("assistant", {"text": "", "tool_calls": [{"name": "sh"}]}, " [calls sh]"),
        ("tool.start", {"name": "sh", "arguments": {"cmd": "ls"}}, 'sh({"cmd": "ls"})'),
        ("tool.result", {"output": "x" * 1000}, "x" * 300),
        ("ask", {"text": "sure?", "choices": ["yes", "no"]}, "q1: sure? [yes | no]"),
        ("answer", {"text": "yes"}, "q1: yes"),
        ("code", {"old": "a", "new": "b"}, "a -> b"),
        ("machine.restore", RESTORE, "rung 2 in 276 ms: frozen"),
        (
            "machine.restore",
            {**RESTORE, "stale": True, "head": 9, "lost": "its files"},
            "rung 2 in 276 ms: frozen; the machine is as of 6, the log ended at 9; lost: its files",
        ),
        (
            "machine.snapshot",
            {"snapshot": "snp_0123456789abcdef", "position": 6, "why": "idle", "figures": FIGURES},
            "idle: snp_0123456789ab, durable in 148 ms, stored 982.3 kB",
        ),
    ],
)
def test_what_is_known_is_said_in_words(kind, body, text):
    assert line(kind, body, "q1") == f"{7:>6}  {kind:<16}  {text}"


@pytest.mark.parametrize(
    ("kind", "body"),
    [("turn.end", {"status": "done"}), ("of.tomorrow", {"a": 1}), ("machine.snapshot", {"snapshot": None}),
     ("machine.restore", {"rung": 2}), ("code", [1])],
)  # fmt: skip
def test_what_is_not_is_shown_as_it_is(kind, body):
    shown = line(kind, body)
    assert shown.startswith(f"     7  {kind}")
    assert shown.endswith(("}", "]"))
