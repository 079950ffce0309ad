"""The table of drivers, from samples."""

from benchmarks.drivers import NATIVE, ROWS, markdown


def samples(**given: list[float]) -> dict[str, list[float]]:
    return {key: given.get(key, []) for key, _, _ in ROWS}


def test_the_table_has_medians_ratios_and_gaps() -> None:
    found = {
        "sides": {NATIVE: samples(cpu=[0.2, 0.1, 0.3]), "gvisor (systrap)": samples(cpu=[0.3, 0.3, 0.9], bytes=[2e6])},
        "skipped": {"firecracker": "it is not there"},
    }
    lines = markdown(found, {"cores": 2}, 3).splitlines()
    assert lines[0] == "Medians of 3 rounds (cores 2)."
    assert "| CPU loop, ms | 200 | 300 (1.5 x) |" in lines
    assert "| stored, MB | - | 2 |" in lines
    assert "| start, ms | - | - |" in lines
    assert lines[-1] == "- firecracker: it is not there"


def test_what_no_process_can_be_measured_by_is_beside_qemu() -> None:
    sides = {NATIVE: samples(), "firecracker (kvm)": samples(durable=[0.03]), "qemu (kvm)": samples(durable=[0.06])}
    lines = markdown({"sides": sides, "skipped": {}}, {}, 1).splitlines()
    assert "| snapshot durable, ms | - | 30 (0.5 x qemu) | 60 |" in lines
