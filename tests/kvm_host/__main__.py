"""Run tests in a host with KVM: `python -m tests.kvm_host [PYTEST ARGUMENT...]`, or, with `--bench [ARGUMENT...]`, `recess bench
drivers`, whose table then has a column for Firecracker and one for QEMU on KVM.

Without arguments: the driver suite on Firecracker, and what is particular to that. RECESS_FIRECRACKER_BIN names the binary.
With RECESS_KVM_HOST_KERNEL the guests there start from that kernel (`trimmed`: the one that `make kernel` built) instead of
Debian's; RECESS_KVM_HOST_MEMORY and RECESS_KVM_HOST_CPUS are how much memory (QEMU's `-m`) and how many processors the host has;
RECESS_KVM_HOST_IMAGES names images that it gets besides `base` (`RECESS_KVM_HOST_IMAGES=hard python -m tests.kvm_host -s tests/hard -k "firecracker and vim"`).
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from recess.config import load_config
from tests.kvm_host.host import REPOSITORY, bench_command, make_host, make_work, pytest_command, run

FOLDER = REPOSITORY / "build" / "kvm_host"
SUITE = "tests/conformance/test_driver_firecracker.py"
PARTICULAR = "tests/machines/test_firecracker.py"
PATIENCE = ["-q", "--timeout", "1800"]  # a guest in a guest in software


async def main(arguments: list[str]) -> int:
    """Make host and work disk, run pytest or the benchmark there, and return its exit code."""
    config = load_config()
    binary = config.firecracker_bin
    host = make_host(FOLDER, config.bin_dir / "guestd")
    work = FOLDER / f"work-{os.getpid()}.ext4"
    kernel = os.environ.get("RECESS_KVM_HOST_KERNEL", "auto")
    environment = {"RECESS_KERNEL": f"{REPOSITORY}/bin/vmlinux" if kernel == "trimmed" else kernel}
    if binary:
        environment["RECESS_FIRECRACKER_BIN"] = f"{REPOSITORY}/bin/firecracker"
    try:
        make_work(host, config.images_dir, Path(binary) if binary else None, work)
        if arguments[:1] == ["--bench"]:
            command = bench_command(arguments[1:], **environment)
        else:
            command = pytest_command([*PATIENCE, *(arguments or [SUITE, PARTICULAR])], **environment)
        memory = os.environ.get("RECESS_KVM_HOST_MEMORY", "3G")
        cpus = int(os.environ.get("RECESS_KVM_HOST_CPUS", "2"))
        async with host.running(work, memory=memory, cpus=cpus) as link:
            return await run(link, command)
    finally:
        work.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
