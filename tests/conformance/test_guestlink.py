"""The guest link against a real guestd as a process on this host, once with the real freezer of a cgroup."""

import os
import tempfile
from pathlib import Path

import pytest

from recess.errors import BadInput, NotFound
from recess.guestlink import ExecRequest
from recess.testing.guestlink_process import guestd_process, writable_cgroup
from recess.testing.guestlink_suite import GuestLinkSuite, run

UNPRIVILEGED = 65534
UNIFIED = writable_cgroup()


class TestAsAProcess(GuestLinkSuite):
    """As whoever runs the tests; root runs the suite a second time as somebody without rights."""

    @pytest.fixture(params=[None, UNPRIVILEGED] if os.getuid() == 0 else [None], ids=lambda user: user and "nobody")
    async def guest(self, short_tmp, request):
        async with guestd_process(short_tmp, user=request.param) as guest:
            yield guest

    @pytest.fixture
    def short_tmp(self):
        """Not in pytest's folder: every pytest that begins on this host closes that to other users."""
        with tempfile.TemporaryDirectory(prefix="recess-") as folder:
            Path(folder).chmod(0o755)
            yield Path(folder)

    async def test_a_process_is_not_started_for_a_stream_that_cannot_be(self, guest):
        left = Path(guest.scratch) / "left"
        for number in (2, 0, (await guest.link.exec(ExecRequest(["sleep", "1000"]))).number):
            with pytest.raises(BadInput):
                await guest.link.request(
                    {
                        "op": "exec",
                        "argv": ["touch", str(left)],
                        "stream": number,
                        "env": {},
                        "cwd": "/",
                        "user": "root",
                    }
                )
        assert len(await guest.link.jobs()) == 1
        assert not left.exists()

    async def test_a_file_is_never_written_through_a_link_laid_in_its_way(self, guest):
        scratch = Path(guest.scratch)
        victim, target = scratch / "victim", scratch / "f"
        victim.write_text("mine")
        victim.chmod(0o666)
        for serial in range(1, 20):
            (scratch / f".f.recess-{serial}").symlink_to(victim)
        await guest.link.write_file(str(target), b"new")
        assert (victim.read_text(), target.read_text()) == ("mine", "new")
        assert not target.is_symlink()


@pytest.mark.skipif(UNIFIED is None, reason="nobody may make cgroups here but root")
class TestWithTheRealFreezer(GuestLinkSuite):
    @pytest.fixture
    async def guest(self, tmp_path):
        async with guestd_process(tmp_path, cgroup=UNIFIED / f"recess-test-{os.getpid()}") as guest:
            assert (await guest.link.info())["freezer"] == "cgroup"
            yield guest

    async def test_children_that_left_their_group_are_frozen_too(self, guest):
        mark = f"{guest.scratch}/n"
        script = f"setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > {mark}.t; mv {mark}.t {mark}; done' & wait"
        await guest.link.exec(ExecRequest(["sh", "-c", script]))
        while True:
            try:
                await guest.link.stat(mark)
                break
            except NotFound:
                await run(guest.link, "true")
        await guest.link.freeze()
        before = await guest.link.read_file(mark)
        for _ in range(20):
            await guest.link.ping()
        assert await guest.link.read_file(mark) == before
