"""A machine's network card: QEMU's user-mode network behind a virtio card, and what may leave it.

Each machine has a network of its own behind its VMM, by one plan, so two forks of one memory share no address with each
other. QEMU opens ordinary sockets of its own process for it: nothing of the host is configured and no right is needed.

    public   every frame the guest sends passes the keeper's filter (guest/keeper/src/card.rs): the public internet, and
             the name server for names; neither the host, its loopback and its neighbours, nor any special range
    open     no filter: whatever a program of the server's user reaches, the host's loopback (as 10.0.2.2) among it
    off      no cards here

The card is part of the device state; connections are not (QEMU's migration of user networks keeps none): what was open at a
freeze is gone after the thaw. This module must know nothing of machines' names, templates or of the broker.
"""

from __future__ import annotations

from recess.errors import BadInput, Unsupported
from recess.machines.contract import VmSpec

PUBLIC, OPEN, OFF = "public", "open", "off"
SETTINGS = (PUBLIC, OPEN, OFF)

_NETWORK, _BITS = "10.0.2.0", 24
_ADDRESS, _GATEWAY, _NAME_SERVER = "10.0.2.15", "10.0.2.2", "10.0.2.3"
_MAC = "52:54:00:52:45:43"
_NETDEV = "net0"
# The keeper's three streams (`keeper run --card`), in the order of their descriptors.
_STREAMS = (("card-sent", 5), ("card-passed", 6), ("card-back", 7))


def card_of(spec: VmSpec, setting: str, *, able: bool = True) -> str:
    """Return which card a machine gets under this setting (`network_cards`): "" for none. `able`: this host's QEMU has a
    network for it. Raises Unsupported when it has none or the operator forbids them, BadInput for a setting that is none."""
    if setting not in SETTINGS:
        raise BadInput(f"network_cards: {', '.join(SETTINGS)}; got {setting!r}")
    if spec.network != "full":
        return ""
    if setting == OFF:
        raise Unsupported(
            "machines get no network card here", hint="the operator set network_cards = off; use --net broker"
        )
    if not able:
        raise Unsupported(
            "this host's QEMU was built without a network for cards (slirp)",
            hint="set RECESS_QEMU_BIN to one that has it, as Debian's has, and see recess doctor; or use --net broker",
        )
    return setting


def kernel_words(spec: VmSpec) -> str:
    """Return what guestd reads: address and mask, gateway, name server."""
    return f"recess.net={_ADDRESS}/{_BITS},{_GATEWAY},{_NAME_SERVER}" if spec.network == "full" else ""


def card_arguments(card: str) -> list[str]:
    """Return QEMU's arguments for a card: the same devices whatever the setting, so that a snapshot fits both."""
    if not card:
        return []
    out = ["-netdev", f"user,id={_NETDEV},ipv6=off,net={_NETWORK}/{_BITS},host={_GATEWAY},dns={_NAME_SERVER}"]
    out += ["-device", f"virtio-net-device,netdev={_NETDEV},mac={_MAC}"]
    if card == OPEN:
        return out
    for name, fd in _STREAMS:
        out += ["-chardev", f"socket,id={name},fd={fd}"]
    (sent, _), (passed, _), (back, _) = _STREAMS
    # "rx" is what the network receives, from the guest; "tx" what it sends.
    out += ["-object", f"filter-redirector,id=card-filter,netdev={_NETDEV},queue=rx,outdev={sent},indev={passed}"]
    return [*out, "-object", f"filter-redirector,id=card-answers,netdev={_NETDEV},queue=tx,indev={back}"]
