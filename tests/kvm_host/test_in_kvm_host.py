"""The Firecracker driver, and QEMU's on KVM, in an emulated host: see host.py. Some minutes on a quiet machine, more on a
busy one. Needs RECESS_FIRECRACKER_BIN; without it the test is skipped by that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.config import load_config
from tests.kvm_host.__main__ import FOLDER, PARTICULAR, PATIENCE, SUITE
from tests.kvm_host.host import REPOSITORY, KvmHost, make_host, make_work, pytest_command, run

pytestmark = [pytest.mark.machines, pytest.mark.timeout(4 * 3600)]


@pytest.fixture(scope="module")
def host(images_dir: Path) -> KvmHost:
    if not load_config().firecracker_bin:
        pytest.skip("RECESS_FIRECRACKER_BIN names no binary")
    return make_host(FOLDER, load_config().bin_dir / "guestd")


@pytest.fixture
def work(host: KvmHost, images_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "work.ext4"
    make_work(host, images_dir, Path(load_config().firecracker_bin), path)
    return path


async def test_the_driver_suite_on_firecracker(host: KvmHost, work: Path) -> None:
    async with host.running(work) as link:
        environment = {"RECESS_FIRECRACKER_BIN": f"{REPOSITORY}/bin/firecracker"}
        tests = [SUITE, PARTICULAR, "tests/machines/test_moves.py::test_a_disk_boots_under_the_other_driver"]
        assert await run(link, pytest_command([*PATIENCE, *tests], **environment)) == 0


async def test_qemu_on_kvm_tracked_and_lazy_also_for_an_ordinary_user_under_yama(host: KvmHost, work: Path) -> None:
    async with host.running(work) as link:
        assert await run(link, "chmod 666 /dev/kvm && echo 1 > /proc/sys/kernel/yama/ptrace_scope") == 0
        tests = [
            "tests/machines/test_paging.py",
            "tests/machines/test_lazy.py",
            "tests/machines/test_driver_qemu.py::test_an_ordinary_user_can_do_all_of_it",
            "tests/machines/test_driver_qemu.py::test_it_runs_within_its_limits",
            "tests/unit/drivers/kept/test_cgroup.py",
            "tests/machines/test_driver_gvisor.py::test_all_of_it_is_within_its_limits",
            "tests/machines/test_driver_gvisor.py::test_one_that_takes_much_more_than_it_has_meets_its_limits",
        ]
        assert await run(link, pytest_command([*PATIENCE, *tests], RECESS_ACCELERATOR="kvm")) == 0
