"""Which driver a node takes: the decision by itself, and the choice on this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.kept.layout import vms_in
from recess.errors import BadInput, DriverFailed, MissingTool
from recess.node import drivers
from recess.node.drivers import Trial, choose_drivers, strongest

KVM = Trial("qemu", "kvm", "KVM ran a guest")
TCG = Trial("qemu", "tcg", "KVM does not run guests here: broken")
NO_QEMU = Trial("qemu", "", "QEMU is not there")
GVISOR = Trial("gvisor", "systrap")
NO_GVISOR = Trial("gvisor", "", "runsc is not there")


@pytest.mark.parametrize(
    ("trials", "name", "said"),
    [
        ([KVM], "qemu", "hardware virtualisation ran a guest"),
        ([TCG, GVISOR], "gvisor", "KVM does not run guests here: broken"),
        ([GVISOR], "gvisor", "none was found"),
        ([NO_GVISOR, TCG], "qemu", "runsc is not there"),
        ([GVISOR, KVM], "qemu", "hardware"),
        ([NO_QEMU, GVISOR], "gvisor", "QEMU is not there"),
        ([NO_GVISOR, NO_QEMU], "qemu", "nothing works here"),
        ([], "qemu", "nothing works here"),
    ],
)
def test_the_strongest_that_works(trials, name, said):
    chosen, reason = strongest(trials)
    assert chosen == name
    assert said in reason
    assert reason.startswith("auto: ")


class Named:
    """A driver that is only probed."""

    def __init__(self, name: str, found: dict | Exception) -> None:
        self.name, self.found, self.probes = name, found, 0

    async def probe(self, *, fresh: bool = False) -> dict:
        assert fresh
        self.probes += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.fixture
def config(tmp_path: Path):
    made = load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", accelerator="tcg")
    made.run_dir.mkdir()
    return made


def given(monkeypatch, *named: Named) -> None:
    monkeypatch.setattr(drivers, "real_drivers", lambda _config: {one.name: one for one in named})


async def test_auto_tries_once_a_boot(monkeypatch, config):
    qemu, gvisor = Named("qemu", {"accelerator": "tcg"}), Named("gvisor", {"platform": "systrap"})
    for _ in range(2):
        given(monkeypatch, qemu, gvisor)
        chosen = await choose_drivers(config)
        assert chosen.driver is gvisor
        assert chosen.others == {"qemu": qemu}
    assert (qemu.probes, gvisor.probes) == (0, 1)  # the weaker one is not tried at all
    assert "kvm: pinned off" in chosen.reason


async def test_auto_goes_on_to_what_works(monkeypatch, config):
    gvisor = Named("gvisor", MissingTool("runsc is not there"))
    given(monkeypatch, Named("qemu", {"accelerator": "tcg", "why": "pinned"}), gvisor)
    chosen = await choose_drivers(config)
    assert chosen.driver.name == "qemu"
    assert "gvisor: runsc is not there" in chosen.reason


async def test_a_node_starts_where_nothing_works(monkeypatch, config):
    given(monkeypatch, Named("qemu", DriverFailed("no", log="")), Named("gvisor", MissingTool("no")))
    chosen = await choose_drivers(config)
    assert chosen.driver.name == "qemu"
    assert "nothing works here" in chosen.reason


@pytest.mark.parametrize("name", ["qemu", "gvisor"])
async def test_a_pinned_driver_is_not_tried(monkeypatch, tmp_path, name):
    config = load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver=name)
    given(monkeypatch, Named("qemu", AssertionError()), Named("gvisor", AssertionError()))
    chosen = await choose_drivers(config)
    assert (chosen.driver.name, chosen.reason) == (name, "the configuration names it")
    assert len(chosen.others) == 1


async def test_the_fake_stands_alone(tmp_path):
    config = load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="fake")
    chosen = await choose_drivers(config)
    assert (chosen.driver.name, chosen.others) == ("fake", {})


async def test_an_unknown_name_is_refused(tmp_path):
    config = load_config({}, home=tmp_path / "home", run_dir=tmp_path / "run", driver="xen")
    with pytest.raises(BadInput, match="xen"):
        await choose_drivers(config)


def test_each_driver_lists_its_own_vms(tmp_path):
    """One run folder, several drivers: what is of nobody one can tell is QEMU's to clear away."""
    for name, journal in (
        ("a", '{"driver":"gvisor"}'),
        ("b", '{"driver":"qemu"}'),
        ("c", "{}"),
        ("d", "{"),
        ("e", "[]"),
    ):
        (tmp_path / "m" / name).mkdir(parents=True)
        (tmp_path / "m" / name / "vm.json").write_text(journal)
    (tmp_path / "m" / "f").mkdir()
    assert vms_in(tmp_path, {"gvisor"}) == ["a"]
    assert vms_in(tmp_path, {"qemu", ""}) == ["b", "c", "d", "e", "f"]
    assert vms_in(tmp_path / "nowhere", {"qemu", ""}) == []
