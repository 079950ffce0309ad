"""The QEMU driver passes the driver suite, on real guests."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.testing.driver_suite import DriverSuite, Rig
from recess.testing.qemu_rig import QemuHome, QemuRig

pytestmark = pytest.mark.machines


class TestQemuDriver(DriverSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path, images_dir: Path) -> Rig:
        home = QemuHome.shared(images_dir)
        return QemuRig(home=tmp_path, spec=home.spec, qemu=home)
