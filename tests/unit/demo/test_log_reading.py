import subprocess

import pytest

from recess.demo import log_reading as read
from recess.testing.model_script import LOOK


def entry(position: int, kind: str, ref: str = "", **body: object) -> dict:
    return {"ts": position / 2, "position": position, "kind": kind, "ref": ref, "turn": 1, "body": body}


LOG = [
    entry(1, "user", text="hi"),
    entry(2, "assistant", text="", tool_calls=[{"id": "a"}, {"id": "b"}]),
    entry(3, "tool.start", "a", name="sh"),
    entry(4, "tool.start", "b", name="charge"),
    entry(5, "tool.result", "a", output="one"),
    entry(6, "tool.settled", "b", output="paid", by="verify"),
    entry(7, "tool.start", "c", name="sh"),
    entry(8, "assistant", text="done", tool_calls=[]),
    entry(
        9,
        "machine.snapshot",
        figures={"standstill_s": 0.02, "new_bytes": 7, "durable_s": 0.1, "freezer_s": 0.03, "pages": 3},
    ),
    entry(10, "machine.restore", rung=2, seconds=0.2),
]


def test_outputs_are_joined_with_their_calls() -> None:
    assert read.tool_outputs(LOG) == [("sh", "one"), ("charge", "paid")]
    assert read.output_of(LOG, "charge") == "paid"
    assert read.output_of(LOG, "recall") == ""
    assert read.open_calls(LOG) == ["sh"]
    assert read.durations(LOG) == {"a": 1.0, "b": 1.0}


def test_texts_and_figures() -> None:
    assert read.last_text(LOG) == "done"
    assert read.last_text(LOG[:3]) == ""
    assert read.snapshot_figures(LOG[8]) == {
        "standstill_s": 0.02, "freezer_s": 0.03, "stored_bytes": 7, "durable_s": 0.1,
    }  # fmt: skip
    left = entry(
        11, "machine.snapshot", figures={"standstill_s": 0.0, "new_bytes": 7, "durable_s": 0.1, "freezer_s": 2.0}
    )
    assert read.snapshot_figures(left) == {"stored_bytes": 7, "durable_s": 0.1}
    assert read.put_away_figures(left, gone=left["ts"] + 0.05) == {"freeze_to_gone_s": pytest.approx(0.15)}
    assert read.restore_figures(LOG[9]) == {"rung": 2, "restore_s": 0.2}


def test_equal_entries_say_the_same() -> None:
    assert read.said(LOG[0]) == read.said({**LOG[0], "session": "other", "ts": 5.0})
    assert read.said(LOG[0]) != read.said(entry(1, "user", text="ho"))


def test_a_look_around_is_read_back() -> None:
    output = (
        '{"nonce": "n", "pid": 7, "served": 3, "up_s": 1.0}\nboot\n12.5 9.0\nhost\nmid\n 0a 0b\nuuid\n0\n<h1>x</h1>\n'
    )
    log = [entry(1, "tool.start", "a", name="sh"), entry(2, "tool.result", "a", output=output)]
    seen = read.look(log)
    assert (seen["nonce"], seen["pid"], seen["served"], seen["boot_id"]) == ("n", "7", "3", "boot")
    assert (seen["uptime_s"], seen["hostname"], seen["machine_id"]) == ("12.5", "host", "mid")
    assert (seen["random"], seen["uuid"], seen["keys"], seen["page"]) == ("0a 0b", "uuid", "0", "<h1>x</h1>\n")
    with pytest.raises(LookupError):
        read.look(LOG)


def test_the_scripts_look_gives_what_is_read(tmp_path) -> None:
    """The real command on this host, with a dev server's stand-in in place of curl (and an id, if the host has none)."""
    (tmp_path / "id").write_text("mid\n")
    look = LOOK.replace("/etc/machine-id", str(tmp_path / "id"))
    (tmp_path / "curl").write_text(
        '#!/bin/sh\ncase "$2" in */_life) printf \'{"nonce": "n", "pid": 1, "served": 2}\';; *) echo page;; esac\n'
    )
    (tmp_path / "curl").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", look], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    log = [entry(1, "tool.start", "a", name="sh"), entry(2, "tool.result", "a", output=done.stdout)]
    seen = read.look(log)
    assert (seen["page"], seen["machine_id"]) == ("page\n", "mid")
    assert float(seen["uptime_s"]) > 0
    assert len(seen["random"].split()) == 16
    assert seen["keys"].isdigit()
