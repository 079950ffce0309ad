"""runsc's command line and the bundle, without a sandbox."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.gvisor import bundle, runsc
from recess.errors import DriverFailed, MissingTool, OutOfSpace, Timeout
from recess.machines.contract import BootFiles, VmSpec

NOWHERE = Path("/nowhere")
SPEC = VmSpec(64 << 20, 1, 64 << 20, BootFiles(NOWHERE, "k", NOWHERE, "i", Path("/i/root.erofs"), "r"))


def program(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "runsc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_runsc_is_found_and_inspected(tmp_path):
    path = program(tmp_path, "echo 'runsc version 0.0~20240729.0'; echo 'spec: 1.0.2-dev'")
    assert runsc.find_runsc(load_config({}, home=str(tmp_path), runsc_bin=str(path))) == path
    found = runsc.inspect_runsc(path)
    assert (found.version, len(found.digest)) == ("0.0~20240729.0", 64)


def test_the_homes_own_runsc_comes_first(tmp_path):
    (tmp_path / "bin").mkdir()
    path = program(tmp_path / "bin", "true")
    assert runsc.find_runsc(load_config({}, home=str(tmp_path))) == path


def test_a_missing_runsc_says_where_to_get_it(tmp_path):
    with pytest.raises(MissingTool) as error:
        runsc.find_runsc(load_config({}, home=str(tmp_path), runsc_bin="/nonexistent/runsc"))
    assert "tools/runsc.sh" in error.value.hint


@pytest.mark.parametrize("said", ["runsc version 0.0~20221219.0", "something else", ""])
def test_an_old_or_unknown_runsc_is_refused(tmp_path, said):
    with pytest.raises(MissingTool, match="too old or unknown"):
        runsc.inspect_runsc(program(tmp_path, f"echo '{said}'"))


def test_a_runsc_that_fails_is_told(tmp_path):
    with pytest.raises(DriverFailed):
        runsc.inspect_runsc(program(tmp_path, "exit 3"))


async def test_only_the_first_line_of_a_trace_is_the_message(tmp_path):
    tool = runsc.Runsc(program(tmp_path, "echo 'the reason' >&2; seq 5000 >&2; exit 1"), "v", "d")
    with pytest.raises(DriverFailed) as error:
        await runsc.call(tool, tmp_path, "checkpoint")
    assert error.value.message == "runsc checkpoint: the reason"
    assert len(error.value.details["log"]) <= 2000


async def test_a_full_host_is_told_as_such(tmp_path):
    tool = runsc.Runsc(program(tmp_path, "echo 'writing pages.img: no space left on device' >&2; exit 1"), "v", "d")
    with pytest.raises(OutOfSpace):
        await runsc.call(tool, tmp_path, "checkpoint")


async def test_a_command_that_hangs_is_ended(tmp_path):
    tool = runsc.Runsc(program(tmp_path, "exec sleep 100"), "v", "d")
    with pytest.raises(Timeout):
        await runsc.call(tool, tmp_path, "pause", timeout_s=0.05)


async def test_the_state_is_awaited(tmp_path):
    path = tmp_path / f"{runsc.CONTAINER}_sandbox:{runsc.CONTAINER}.state"
    assert runsc.status(tmp_path) == ""
    waiting = asyncio.ensure_future(runsc.wait_running(tmp_path))
    for text in ("{", "[]", '{"status": "creating"}'):
        path.write_text(text)
        await asyncio.sleep(0.01)
        assert not waiting.done()
    path.write_text('{"status": "running"}')
    await asyncio.wait_for(waiting, 5)
    assert runsc.status(tmp_path) == runsc.RUNNING


def test_the_bundle_opens_the_image_itself_and_has_no_network():
    made = bundle.config(SPEC, root=Path("/run/r"), init=Path("/run/i"), user=0)
    assert made["annotations"]["dev.gvisor.spec.rootfs.source"] == "/i/root.erofs"
    kinds = [n["type"] for n in made["linux"]["namespaces"]]
    assert "network" in kinds
    assert "user" not in kinds
    assert json.loads(json.dumps(made)) == made


def test_an_ordinary_user_gets_a_user_namespace_of_one():
    made = bundle.config(SPEC, root=Path("/run/r"), init=Path("/run/i"), user=1000)
    assert {"type": "user"} in made["linux"]["namespaces"]
    assert made["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 1000, "size": 1}]
