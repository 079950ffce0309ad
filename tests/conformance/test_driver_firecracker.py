"""The Firecracker driver passes the driver suite, on real guests: where RECESS_FIRECRACKER_BIN names a binary and KVM may
be opened. `tests/kvm_host` makes such a place where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.testing.driver_suite import DriverSuite, Rig
from recess.testing.firecracker_rig import FirecrackerHome, FirecrackerRig, why_no_firecracker

pytestmark = pytest.mark.machines


class TestFirecrackerDriver(DriverSuite):
    @pytest.fixture
    def rig(self, tmp_path: Path, images_dir: Path) -> Rig:
        if why := why_no_firecracker():
            pytest.skip(why)
        home = FirecrackerHome.shared(images_dir)
        return FirecrackerRig(home=tmp_path, spec=home.spec, firecracker=home)
