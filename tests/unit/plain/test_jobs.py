"""Processes under their keepers: what the files say is what was, whoever reads them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from recess.errors import BadInput, GuestFailed, IllegalState, NotFound, Unsupported
from recess.plain import keeper
from recess.plain.jobs import LOST, PlainJob, PlainJobs
from recess.testing.patience import wait_until


@pytest.fixture
def jobs(tmp_path):
    one = PlainJobs(tmp_path / "jobs")
    yield one
    asyncio.run(one.end_all())


async def run(jobs, tmp_path, *argv, job="j1", **env):
    await jobs.start(job, argv, env={"PATH": os.environ["PATH"], **env}, cwd=tmp_path, label="l", shown=argv, now=1.0)
    return jobs.find(job)


async def test_output_and_code_are_kept(jobs, tmp_path):
    await run(jobs, tmp_path, "sh", "-c", "echo $A; pwd; echo err >&2; exit 3", A="b")
    assert await jobs.ended("j1") == 3
    out = b"".join([piece async for piece in jobs.output("j1")])
    assert out.decode().split() == ["b", str(tmp_path), "err"]
    job = PlainJob(jobs, jobs.find("j1"))
    assert await job.wait() == 3
    assert [one async for one in job.output()] == [(1, out)]
    with pytest.raises(Unsupported):
        await job.write(b"x")
    again = PlainJobs(tmp_path / "jobs")  # another server
    assert again.find("j1").exit_code == 3
    again.forget("j1")
    assert jobs.list() == []
    with pytest.raises(NotFound):
        jobs.find("j1")


async def test_a_process_belongs_to_nobody_but_its_keeper(jobs, tmp_path):
    info = await run(jobs, tmp_path, "sleep", "1000")
    same = await run(jobs, tmp_path, "sleep", "1000")
    assert same.pid == info.pid  # a job id that is known is that job
    assert info.exit_code is None
    with pytest.raises(IllegalState, match="still runs"):
        jobs.forget("j1")
    PlainJobs(tmp_path / "jobs").signal(signal.SIGTERM, "j1")
    assert await jobs.ended("j1") == 128 + signal.SIGTERM


async def test_what_cannot_be_run_is_told(jobs, tmp_path):
    with pytest.raises(GuestFailed, match="No such file"):
        await run(jobs, tmp_path, "no-such-program")
    assert jobs.list() == []
    for odd in ("", "../x", ".hidden"):
        with pytest.raises(BadInput):
            await run(jobs, tmp_path, "true", job=odd)


async def test_a_deadline_ends_it_without_any_server(jobs, tmp_path):
    await run(jobs, tmp_path, "sh", "-c", "sleep 1000 & sleep 1000")
    jobs.set_deadline(time.monotonic() + 3600)
    jobs.set_deadline(None)
    assert jobs.find("j1").exit_code is None
    jobs.set_deadline(time.monotonic() - 1)
    assert await jobs.ended("j1") == 137


async def test_a_keeper_that_was_killed_leaves_a_lost_job(jobs, tmp_path):
    info = await run(jobs, tmp_path, "sleep", "1000")
    known = json.loads((tmp_path / "jobs" / "j1.pid").read_text())
    os.kill(known["keeper"], signal.SIGKILL)
    assert await jobs.ended("j1") == LOST
    os.killpg(info.pid, signal.SIGKILL)


def test_a_number_that_was_used_again_is_not_our_keeper():
    assert keeper.begun(os.getpid()) != ""
    assert keeper.begun(2**22 + 1) == ""


def test_the_keeper_lets_go_of_our_output(tmp_path):
    (tmp_path / "j.json").write_text(
        json.dumps({"argv": ["sleep", "1000"], "env": dict(os.environ), "cwd": str(tmp_path)})
    )
    command = [sys.executable, "-I", "-S", keeper.__file__, str(tmp_path), "j"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)  # would not return if it held them
    assert (done.returncode, done.stderr) == (0, b"")
    os.killpg(json.loads((tmp_path / "j.pid").read_text())["pid"], signal.SIGKILL)
    assert wait_until(lambda: (tmp_path / "j.code").exists() and (tmp_path / "j.code").read_text()) == "137"
