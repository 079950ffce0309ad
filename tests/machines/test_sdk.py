"""The SDK and E2B's shape on a real machine: what a program holds in memory is there after a pause and in a fork."""

import os

import pytest

from recess import Machine
from recess.adapters.e2b import Sandbox
from recess.embedded import embedded
from recess.errors import Timeout

pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]


def test_a_tools_computer(real_config, tmp_path):
    with embedded(str(real_config.home), run_dir=str(real_config.run_dir), driver="qemu") as client:
        with Machine.run(client=client) as machine:
            files_and_processes(machine)
            a_process_in_two_machines(machine)
        volumes_booted_restored_and_forked(client, tmp_path)
        with Sandbox.create(client=client) as sandbox:
            code_that_remembers(sandbox)


def files_and_processes(machine):
    machine.files.make_dir("/root/a/b")
    machine.files.make_dir("/root/a/b")
    watch = machine.files.watch("/root/a", depth=3)
    machine.files.write("/root/a/b/x.py", "import sys; print(6 * 7); sys.exit(3)")
    assert [(one.what, one.path) for one in watch.changes()] == [("created", "/root/a/b/x.py")]
    done = machine.exec("python3 /root/a/b/x.py; code=$?; echo told >&2; exit $code")
    assert (done.exit_code, done.stdout, done.stderr) == (3, "42\n", "told\n")
    with pytest.raises(Timeout):
        machine.exec("sleep 1000", timeout_s=0.2)
    slept = next(one for one in machine.jobs() if "sleep 1000" in one["argv"])
    assert machine.attach(slept["job_id"]).wait(30).exit_code == 137


def a_process_in_two_machines(machine):
    process = machine.start("read x; echo heard $x", stdin=True)
    (child,) = machine.fork()
    with child:
        for one, name in ((machine, "parent"), (child, "child")):
            reader = one.attach(process.job_id)
            reader.write(f"{name}\n")
            assert reader.wait(30).stdout == f"heard {name}\n"


def volumes_booted_restored_and_forked(client, tmp_path):
    folder = tmp_path / "shared"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "script").write_text("#!/bin/sh\necho ran\n")
    (folder / "deep" / "script").chmod(0o755)
    (folder / "link").symlink_to("deep/script")
    os.utime(folder / "deep" / "script", (1_700_000_000, 1_700_000_000))
    with Machine.run(volumes={str(folder): "/srv/w"}, client=client) as machine:
        assert machine.exec("/srv/w/link; stat -c %Y /srv/w/deep/script").stdout == "ran\n1700000000\n"
        machine.exec(
            "echo made > /srv/w/made; ln -s made /srv/w/to; ln -s /etc/passwd /srv/w/out; rm /srv/w/link"
        ).check()
        machine.suspend()
        assert (folder / "made").read_text() == "made\n"
        assert sorted(p.name for p in folder.iterdir()) == ["deep", "made", "to"]
        (folder / "made").write_text("by the host")
        machine.resume()
        assert machine.exec("cat /srv/w/to").stdout == "by the host"
        (child,) = machine.fork()
        with child:
            child.exec("echo child > /srv/w/child").check()
            machine.exec("echo parent > /srv/w/parent").check()
            (report,) = machine.sync_volumes()
            assert (report["copied_out"], report["copied_in"]) == (1, 0)
            child.suspend()
            assert not (folder / "child").exists()
            child.resume()
            (report,) = child.sync_volumes()
            assert (report["copied_out"], report["copied_in"], report["conflicts"]) == (1, 1, [])
        assert (folder / "child").read_text() == "child\n"


def code_that_remembers(sandbox):
    assert sandbox.run_code("import secrets\nx = secrets.token_hex(8)\nprint('made')").logs.stdout == ["made\n"]
    nonce = sandbox.run_code("x").text
    assert sandbox.pause() is True
    sandbox.connect()
    assert sandbox.run_code("x").text == nonce
    (child,) = sandbox.fork()
    with child:
        assert child.run_code("x").text == nonce
        child.run_code("x = 'of the child'")
    assert sandbox.run_code("x").text == nonce
    other = sandbox.create_code_context()
    assert sandbox.run_code("x", context=other).error.name == "NameError"
    sandbox.files.write("old", "1")
    assert sandbox.files.rename("old", "new").name == "new"
