"""The image `base` in a real machine: it boots, holds what it promises, and its pages are found in memory."""

from __future__ import annotations

import numpy as np
import pytest

from recess.config import Config
from recess.drivers.qemu import QemuDriver
from recess.images import FilePages, ImageStore, clone_sparse, ensure_blank_disk, ensure_boot_files
from recess.machines.contract import DISK_NAME, BootFiles, VmSpec
from recess.testing.driver_suite import new_thaw, shell
from recess.units import GIB, MIB

CHECKS = {
    "python": "python3 -c 'import json, ssl, sqlite3, ctypes, venv; print(42)'",
    "tools": "git --version && curl --version | head -n 1 && ps --version",
    "certificates": "test -s /etc/ssl/certs/ca-certificates.crt",
    "owners": "test $(stat -c %u:%g:%a /etc/shadow) = 0:42:640 && test $(stat -c %a /usr/bin/passwd) = 4755",
    "neutral": "test ! -s /etc/resolv.conf && test ! -e /etc/apt/apt.conf.d/99mmdebstrap",
    "writable": "echo x > /usr/lib/x && test $(cat /usr/lib/x) = x && rm /usr/lib/x",
    "compiled": "python3 -X importtime -c 'import json' 2>&1 | grep -q json && "
    "python3 -vc 'import json' 2>&1 | grep -q 'matches /usr/lib/python3.11/json/__init__.py'",
    "pip": "mkdir -p /tmp/p && cd /tmp/p && "
    'printf \'[project]\\nname="sample"\\nversion="1"\\n[build-system]\\nrequires=[]\\n'
    'build-backend="setuptools.build_meta"\\n[tool.setuptools]\\npy-modules=["sample"]\\n\' > pyproject.toml && '
    "echo 'word = \"hi\"' > sample.py && "
    "python3 -m pip install --quiet --no-index --no-build-isolation --break-system-packages --root-user-action=ignore . "
    "&& cd / && python3 -c 'import sample; assert sample.word == \"hi\"'",
}


def small_machine(config: Config) -> VmSpec:
    """A machine of `base` with 512 MiB."""
    image = ImageStore(config.images_dir).get("base")
    files = ensure_boot_files(config.images_dir, config.bin_dir / "guestd", kernel=config.kernel)
    boot = BootFiles(files.kernel, files.kernel_hash, files.initrd, files.initrd_hash, image.root_path, image.root_hash)
    return VmSpec(memory_bytes=512 * MIB, cpus=1, disk_bytes=GIB, boot=boot)


@pytest.mark.timeout(300)
async def test_base_holds_what_it_promises_and_its_pages_are_shared(real_config, tmp_path):
    spec = small_machine(real_config)
    directory = tmp_path / "machine"
    directory.mkdir()
    clone_sparse(ensure_blank_disk(real_config.images_dir, spec.disk_bytes).path, directory / DISK_NAME)
    vm = await QemuDriver(real_config).boot("mch_images", spec, directory)
    try:
        await vm.link.thaw(new_thaw())
        failed = {}
        for name, script in CHECKS.items():
            said = await shell(vm.link, f"({script}) > /tmp/out 2>&1 && echo good || tail -n 5 /tmp/out")
            if not said.strip().endswith("good"):
                failed[name] = said
        assert failed == {}
        capture = await vm.capture(resume=False)
        try:
            pages = np.frombuffer(capture.memory.data, dtype=np.uint8).reshape(-1, 4096)
            with_root = _found(ImageStore(real_config.images_dir).pages(spec.boot.root_hash), pages)
            in_kernel = _found(FilePages.open(spec.boot.kernel, spec.boot.kernel_hash), pages)
            del pages
        finally:
            capture.close()
    finally:
        await vm.kill()
    assert with_root > 2000, "the page cache of the root image is not found in the image"
    blocks = spec.boot.kernel.stat().st_size // 4096
    assert in_kernel > blocks / 4, "the kernel's code is not found in its file"


def _found(source: FilePages, pages: np.ndarray) -> int:
    found = source.lookup_many(pages)
    where = np.nonzero(found >= 0)[0]
    sample = where[:: max(1, len(where) // 50)]
    assert all(bytes(source.read_block(int(found[i]))) == pages[i].tobytes() for i in sample)
    source.close()
    return len(where)


def test_what_is_built_is_what_is_stored(images_dir):
    store = ImageStore(images_dir)
    store.verify("base")
    assert store.get("base").size_bytes % 4096 == 0
