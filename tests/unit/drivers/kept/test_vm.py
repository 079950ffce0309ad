"""What VMs of every VMM have in common, as far as it is decided before anything runs."""

from recess.drivers.kept.vm import hello_timeout_s
from recess.units import GIB, MIB


def test_a_large_machine_has_longer_to_come_up() -> None:
    assert hello_timeout_s(120.0, 512 * MIB) == 135.0
    assert hello_timeout_s(120.0, 8 * GIB) == 360.0
