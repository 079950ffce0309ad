"""Which card a machine gets, and QEMU's arguments for it, as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recess.config import load_config
from recess.drivers.qemu import QemuDriver
from recess.drivers.qemu.argv import command, kernel_command_line
from recess.drivers.qemu.card import OFF, OPEN, PUBLIC, SETTINGS, card_arguments, card_of
from recess.drivers.qemu.host import HostFacts
from recess.errors import BadInput, Unsupported
from tests.unit.drivers.qemu.test_argv import LAYOUT, QEMU, SPEC

FULL = replace(SPEC, network="full")


def devices(argv: list[str]) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv) if word in ("-device", "-netdev")]


@pytest.mark.parametrize("network", ["broker", "none"])
def test_only_full_has_a_card_and_pays_for_it(network: str) -> None:
    spec = replace(SPEC, network=network)
    assert [card_of(spec, setting) for setting in SETTINGS] == ["", "", ""]
    assert "recess.net" not in kernel_command_line(spec, 1)
    plain = command(QEMU, spec, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet")
    assert not any("net" in word for word in devices(plain))
    assert plain == command(QEMU, SPEC, LAYOUT, ram=LAYOUT.ram, share=True, boot="quiet", card="")


def test_the_operator_decides() -> None:
    assert card_of(FULL, PUBLIC) == PUBLIC
    assert card_of(FULL, OPEN) == OPEN
    with pytest.raises(Unsupported) as told:
        card_of(FULL, OFF)
    assert "network_cards" in told.value.hint
    with pytest.raises(BadInput, match="network_cards"):
        card_of(SPEC, "all")


def test_a_qemu_without_a_network_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="slirp") as told:
        card_of(FULL, PUBLIC, able=False)
    assert "RECESS_QEMU_BIN" in told.value.hint
    assert card_of(SPEC, PUBLIC, able=False) == ""


async def test_it_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = HostFacts(replace(QEMU, cards=False), ("sse2",), 2_300_000, "because")

    async def found(*_args: object, **_kwargs: object) -> HostFacts:
        return facts

    monkeypatch.setattr("recess.drivers.qemu.driver.host_facts", found)
    driver = QemuDriver(load_config(home=str(tmp_path)))
    await driver.fingerprint(SPEC)
    with pytest.raises(Unsupported, match="slirp"):
        await driver.fingerprint(FULL)
    assert not driver.capabilities.network_full
    assert "none" in (await driver.probe())["network_cards"]


def test_the_devices_are_the_same_with_and_without_the_filter() -> None:
    def argv(card: str, boot: str | None = None) -> list[str]:
        return command(QEMU, FULL, LAYOUT, ram=Path("/t/ram"), share=False, boot=boot, card=card)

    assert devices(argv(PUBLIC)) == devices(argv(OPEN)) == devices(argv(PUBLIC, "quiet"))
    assert "virtio-net-device" in devices(argv(OPEN))[-1]


def test_all_that_a_guest_sends_passes_the_filter() -> None:
    words = card_arguments(PUBLIC)
    assert "filter-redirector,id=card-filter,netdev=net0,queue=rx,outdev=card-sent,indev=card-passed" in words
    assert "filter-redirector,id=card-answers,netdev=net0,queue=tx,indev=card-back" in words
    assert [w for w in words if w.startswith("socket,")] == [
        "socket,id=card-sent,fd=5", "socket,id=card-passed,fd=6", "socket,id=card-back,fd=7",
    ]  # fmt: skip
    assert not any("filter" in word for word in card_arguments(OPEN))


def test_guestd_is_told_the_plan_that_qemu_keeps() -> None:
    assert "recess.net=10.0.2.15/24,10.0.2.2,10.0.2.3" in kernel_command_line(FULL, 1).split()
    netdev = card_arguments(OPEN)[1]
    assert {"net=10.0.2.0/24", "host=10.0.2.2", "dns=10.0.2.3", "ipv6=off"} <= set(netdev.split(","))


def test_the_capability_follows_the_configuration(tmp_path: Path) -> None:
    for setting, can in ((PUBLIC, True), (OPEN, True), (OFF, False)):
        config = load_config({"RECESS_NETWORK_CARDS": setting}, home=str(tmp_path))
        assert QemuDriver(config).capabilities.network_full is can
