"""What `--net full` changes above the machine: the broker's policy, the environment, the template."""

from __future__ import annotations

from dataclasses import replace

from recess.broker.policy import decide_address, decide_target
from recess.broker.rules import plain_address
from recess.machines.identity import BROKER_ENV, guest_env
from recess.machines.service import MachineSpec
from recess.machines.trust import policy_of

FULL = MachineSpec(network="full")


def env(spec: MachineSpec) -> dict[str, str]:
    return guest_env("mch_x", "x", "", spec)


def test_by_the_broker_a_card_reaches_public_hosts_too_and_no_others() -> None:
    policy = policy_of(FULL)
    assert decide_target(policy, "example.org", 8443).allowed
    assert decide_address(policy, "example.org", plain_address("93.184.216.34"), 8443).allowed
    assert not decide_address(policy, "example.org", plain_address("127.0.0.1"), 80).allowed
    assert not decide_target(policy, "db.recess.internal", 80).allowed
    assert not decide_target(policy_of(replace(FULL, network="broker")), "example.org", 443).allowed


def test_programs_go_by_the_broker_where_it_has_something_to_give() -> None:
    assert not BROKER_ENV.keys() & env(FULL).keys()
    for spec in (replace(FULL, secrets=("KEY@api.test",)), replace(FULL, allow=("db.recess.internal",))):
        assert BROKER_ENV.items() <= env(spec).items()
    own = replace(FULL, allow=("a.test",), env={"http_proxy": "http://mine"})
    assert env(own)["http_proxy"] == "http://mine"
    assert not BROKER_ENV.keys() & env(replace(FULL, network="broker", allow=("a.test",))).keys()  # guestd sets them
