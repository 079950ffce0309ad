import subprocess
import sys
from pathlib import Path

import pytest

from recess.demo.processes import kill_all, processes_of, wait_gone


@pytest.fixture
def sleeper(tmp_path):
    """A process that names a file of tmp_path in its command line and lives until it is killed."""
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "m" / "vm")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


async def test_found_by_folder_killed_and_gone(tmp_path, sleeper) -> None:
    found = processes_of(tmp_path)
    assert [one.pid for one in found] == [sleeper.pid]
    assert found[0].pss_bytes > 0
    assert processes_of(tmp_path / "other") == []
    assert processes_of(tmp_path, but_in=Path.cwd()) == []
    assert len(processes_of(tmp_path, but_in=tmp_path)) == 1
    assert await wait_gone([sleeper.pid], 0.05) == [sleeper.pid]
    kill_all([sleeper.pid])
    assert await wait_gone([sleeper.pid], 10.0) == []
    sleeper.wait()
    kill_all([sleeper.pid])  # gone already: no error
    assert await wait_gone([sleeper.pid], 1.0) == []
    assert processes_of(tmp_path) == []


async def test_nothing_to_wait_for() -> None:
    assert await wait_gone([], 1.0) == []
