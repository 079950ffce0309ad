"""`Machine`, `AsyncMachine` and the server inside this process: the whole way over HTTP, machines by the fake driver."""

import asyncio
import tempfile
import urllib.request
from pathlib import Path

import pytest

import recess
from recess import AsyncMachine, Client, CommandFailed, Machine
from recess.embedded import embedded
from recess.errors import BadInput, HomeLocked, IllegalState, NotFound, ServerUnavailable, Timeout
from recess.sdk.client import default_client, use
from recess.sdk.machine_files import Change, FileInfo, compare
from recess.sdk.processes import Output
from recess.testing.patience import wait_until


@pytest.fixture(scope="module")
def client():
    with (
        tempfile.TemporaryDirectory(prefix="rcm") as folder,
        embedded(f"{folder}/home", driver="fake", run_dir=f"{folder}/run") as one,
    ):
        yield one


@pytest.fixture
def machine(client):
    with Machine.run(client=client) as one:
        yield one


def test_a_command_has_its_output_and_its_code(machine):
    done = machine.exec("echo out $A; ls /none", env={"A": "b"})
    assert (done.exit_code, done.stdout, "/none" in done.stderr, done.ok) == (1, "out b\n", True, False)
    with pytest.raises(CommandFailed, match=r"exit code 1: .*/none") as failed:
        done.check()
    assert failed.value.result is done
    assert machine.exec(["echo", "two words", "$HOME"]).check().stdout == "two words $HOME\n"
    assert machine.exec(["cat"], stdin="fed").stdout == "fed"


def test_output_comes_while_it_runs_and_stdin_goes_in(machine):
    with machine.start(["cat"], stdin=True) as process:
        pieces = iter(process)
        process.write("one\n")
        assert next(pieces) == (1, b"one\n")
        process.write(b"two\n")
        assert next(pieces) == (1, b"two\n")
        process.close_stdin()
        assert list(pieces) == []
        assert process.exit_code == 0


def test_who_stops_reading_may_read_on(machine):
    with machine.start("echo a; cat", stdin=True) as process:
        for _piece in process:
            break
        process.write("b\n")
        process.close_stdin()
        assert process.wait(30).stdout == "b\n"


def test_a_command_that_takes_too_long_is_ended(machine):
    with pytest.raises(Timeout):
        machine.exec("sleep 1000", timeout_s=0.01)
    (job,) = machine.jobs()
    assert job["argv"] == ["sh", "-c", "sleep 1000"]
    assert machine.attach(job["job_id"]).wait(30).exit_code == 137


def test_a_process_outlives_its_handle_and_is_found_again(machine):
    with machine.start(["cat"], stdin=True) as process:
        pass
    again = machine.attach(process.job_id)
    again.write("me\n")
    again.close_stdin()
    assert again.wait(30).stdout == "me\n"
    with pytest.raises(IllegalState):
        again.signal(15)
    with pytest.raises(NotFound):
        machine.attach("nothing")


def test_files(machine):
    files = machine.files
    files.write("/root/a/b.txt", "text", mode=0o600)
    files.write("/root/a/b.bin", b"\0\xff")
    files.make_dir("/root/a/c/d")
    files.make_dir("/root/a/c/d")
    assert files.read("/root/a/b.bin") == b"\0\xff"
    assert files.read_text("/root/a/b.txt") == "text"
    found = files.stat("/root/a/b.txt")
    assert (found.kind, found.size, found.mode, found.name) == ("file", 4, 0o600, "b.txt")
    assert [one.name for one in files.list("/root/a")] == ["b.bin", "b.txt", "c"]
    assert "/root/a/c/d" in [one.path for one in files.list("/root", depth=3)]
    assert files.exists("/root/a")
    files.remove("/root/a/b.txt")
    files.remove("/root/a/b.txt")
    assert not files.exists("/root/a/b.txt")
    with pytest.raises(BadInput):
        files.remove("/root/a")
    files.remove("/root/a", recursive=True)
    with pytest.raises(NotFound):
        files.list("/root/a")
    for wrong in (lambda: files.read("relative"), lambda: files.list("/root", depth=0)):
        with pytest.raises(BadInput):
            wrong()


def test_what_changed_in_a_folder(machine):
    machine.files.write("/root/w/old", "1")
    machine.files.write("/root/w/gone", "1")
    watch = machine.files.watch("/root/w")
    assert watch.changes() == []
    machine.files.write("/root/w/old", "22")
    machine.files.write("/root/w/new", "1")
    machine.files.remove("/root/w/gone")
    whats = [Change("removed", "/root/w/gone"), Change("created", "/root/w/new"), Change("changed", "/root/w/old")]
    assert watch.changes() == whats
    assert watch.changes() == []


def test_a_folder_whose_time_alone_changed_is_no_change():
    before, after = (FileInfo("/a", "dir", 0, 0o755, time) for time in (1.0, 2.0))
    assert compare({"/a": before}, {"/a": after}) == []


def test_put_away_and_brought_back_it_is_the_same_machine(machine):
    process = machine.start(["cat"], stdin=True)
    stored = machine.suspend()
    assert stored.id.startswith("snp_")
    assert machine.state == "suspended"
    back = machine.resume()
    assert (back.rung, back.snapshot) == (2, stored.id)
    again = machine.attach(process.job_id)
    again.write("it\n")
    again.close_stdin()
    assert again.wait(30).stdout == "it\n"


def test_forks_and_restored_machines_have_what_it_had(machine, client):
    machine.files.write("/root/here", "1")
    machine.snapshot("base:v1")
    left, right = machine.fork(2)
    third = Machine.restore("base:v1", name="third", client=client)
    assert third.resumed.rung == 2
    left.files.write("/root/here", "2")
    assert [one.files.read_text("/root/here") for one in (machine, left, right, third)] == ["1", "2", "1", "1"]
    assert Machine.get("third", client=client).id == third.id
    running = {one.id for one in Machine.list(client=client)}
    assert {machine.id, left.id, right.id, third.id} <= running
    for one in (left, right, third):
        one.remove()
        one.remove()
    with pytest.raises(NotFound):
        Machine.get("third", client=client)


def test_a_published_port_is_reached(client):
    with Machine.run(ports=[80], client=client) as machine:
        machine.files.write("/root/index.html", "hello")
        machine.start("python3 -m http.server 80")
        host, port = machine.port(80)
        assert wait_until(lambda: _get(f"http://{host}:{port}/")) is not None
        with pytest.raises(NotFound, match="does not publish"):
            machine.port(81)


def _get(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read()
    except OSError:
        return None


def test_the_same_key_is_the_same_machine(client):
    with Machine.run(key="k1", client=client) as one:
        assert Machine.run(key="k1", client=client).id == one.id


async def test_the_same_for_asyncio(client):
    heard = []
    async with await AsyncMachine.run(client=client) as machine:
        await machine.files.write("/root/x", "1")
        done = await machine.exec("cat /root/x; ls /none", on_stdout=heard.append)
        assert (done.stdout, b"".join(heard)) == ("1", b"1")
        assert "/none" in done.stderr
        results = await asyncio.gather(*(machine.exec(f"echo {n}") for n in range(20)))
        assert [one.stdout for one in results] == [f"{n}\n" for n in range(20)]
        process = await machine.start(["cat"], stdin=True)
        await process.write("it\n")
        await process.close_stdin()
        assert [piece async for piece in process] == [(1, b"it\n")]
        watch = await machine.files.watch("/root")
        await machine.files.make_dir("/root/d")
        assert await watch.changes() == [Change("created", "/root/d")]
        await machine.suspend()
        assert (await machine.resume()).rung == 2
        (child,) = await machine.fork()
        async with child:
            assert await child.files.read_text("/root/x") == "1"
            assert await child.files.exists("/root/d")


def test_a_home_has_one_server(client):
    home = client.info()["home"]
    with pytest.raises(HomeLocked), embedded(home, driver="fake"):
        raise AssertionError("two servers in one home")


def test_an_embedded_server_ends_by_its_own_call_and_spares_this_process(tmp_path):
    with embedded(str(tmp_path / "h"), driver="fake", run_dir=str(tmp_path / "r")) as one:
        one.call("POST", "/v1/shutdown", {})
        wait_until(lambda: not (tmp_path / "r" / "server.sock").exists())
        with pytest.raises(ServerUnavailable):
            one.info()


def test_the_default_client_can_be_chosen(client):
    use(client)
    try:
        assert default_client() is client
        with Machine.run() as machine:
            assert machine.client is client
    finally:
        use(None)
    assert isinstance(default_client(), Client)


def test_output_beyond_the_limit_is_counted():
    output = Output(limit=3)
    output.add(1, b"ab")
    output.add(2, b"cd")
    done = output.result(0)
    assert (done.stdout, done.stderr, done.dropped) == ("ab", "c", 1)


def test_the_package_has_its_names():
    assert all(hasattr(recess, name) for name in recess.__all__)
    with pytest.raises(AttributeError):
        recess.nothing  # noqa: B018
    assert Path(recess.__file__).is_file()
