"""`recess run -it` in a real terminal (tmux): a shell that is frozen from another terminal and goes on, resize, Ctrl-C,
UTF-8, colours, detach keys."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

BOUND_S = 180.0
LOOK_S = 0.2


class Pane:
    """One tmux window of 80 by 24 with a shell in it."""

    def __init__(self, folder, env):
        self._base = ["tmux", "-u", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        self._env = env
        self._tmux("new-session", "-d", "-x", "80", "-y", "24", "env PS1='host> ' sh")
        self._tmux("set", "-g", "status", "off")  # its line would be one of the 24
        self._tmux("resize-window", "-x", "80", "-y", "24")

    def _tmux(self, *words):
        done = subprocess.run([*self._base, *words], env=self._env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def keys(self, *names):
        self._tmux("send-keys", *names)

    def type(self, line):
        """Type a line and Enter."""
        self._tmux("send-keys", "-l", line)
        self.keys("Enter")

    def resize(self, columns, rows):
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self, *, colours=False):
        return self._tmux("capture-pane", "-p", "-J", "-S", "-200", *(["-e"] if colours else []))

    def expect(self, text, *, colours=False):
        """Wait until a line of the screen begins with this: what is typed stands behind a prompt."""
        end = time.monotonic() + BOUND_S
        while time.monotonic() < end:
            shown = self.screen(colours=colours)
            if any(line.startswith(text) for line in shown.splitlines()):
                return
            time.sleep(LOOK_S)
        raise AssertionError(f"no line {text!r} on the screen:\n{self.screen()}")

    def close(self):
        subprocess.run([*self._base, "kill-server"], env=self._env, capture_output=True, timeout=30)


@pytest.fixture
def recess(real_config):
    """Run the command line; everything it made ends with the test."""
    env = {
        "PATH": os.environ["PATH"], "HOME": str(real_config.home), "RECESS_HOME": str(real_config.home), "LANG": "C.UTF-8",
        "RECESS_RUN_DIR": str(real_config.run_dir), "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "screen",
    }  # fmt: skip
    command = [sys.executable, "-m", "recess.cli.main"]

    def call(*words):
        return subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=BOUND_S, check=True)

    call.env, call.line = env, " ".join(command)
    yield call
    call("down", "--all")


@pytest.fixture
def pane(recess, tmp_path):
    opened = Pane(tmp_path, recess.env)
    yield opened
    opened.close()


@pytest.mark.timeout(600)
def test_a_shell_in_a_terminal(recess, pane):
    recess("run", "--rm", "base", "true")  # the template is made, with its lines of progress
    pane.type(f"{recess.line} run -it --name term -e PS1='guest> ' base bash --norc")
    pane.expect("guest>")
    pane.type("kept=$((6 * 7)); echo is $kept; tty")
    pane.expect("is 42")
    pane.expect("/dev/pts/")
    pane.type("echo 'grüße 漢字 ✓' | sed 's/^/utf8: /'; printf '\\033[31mred\\033[0m\\n'")
    pane.expect("utf8: grüße 漢字 ✓")
    pane.expect("\x1b[31mred", colours=True)
    pane.type("stty size | sed 's/^/size /'")
    pane.expect("size 24 80")
    pane.resize(100, 30)
    pane.type("until [ \"$(stty size)\" = '30 100' ]; do :; done; echo resized")
    pane.expect("resized")
    pane.type("echo begun; sleep 10000; true")
    pane.expect("begun")
    pane.keys("C-c")
    pane.type("echo code $?")
    pane.expect("code 130")

    recess("suspend", "term")
    pane.expect("term is suspended; going on when it is resumed")
    pane.resize(90, 25)
    recess("resume", "term")
    pane.type("echo still $kept; until [ \"$(stty size)\" = '25 90' ]; do :; done; echo as wide")
    pane.expect("still 42")
    pane.expect("as wide")

    pane.keys("C-p", "C-q")
    pane.expect("host>")
    pane.type(f"{recess.line} attach term; echo it gave $?")
    pane.type("echo attached $kept")
    pane.expect("attached 42")
    pane.type("exit 7")
    pane.expect("it gave 7")
