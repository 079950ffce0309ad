"""The gVisor driver passes the driver suite, in real machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.testing.driver_suite import DriverSuite, Rig
from recess.testing.gvisor_rig import GvisorHome, GvisorRig, has_runsc

pytestmark = pytest.mark.machines


class TestGvisorDriver(DriverSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path, images_dir: Path) -> Rig:
        if not has_runsc():
            pytest.skip("runsc is not installed")
        home = GvisorHome.shared(images_dir)
        return GvisorRig(home=tmp_path, spec=home.spec, gvisor=home)
