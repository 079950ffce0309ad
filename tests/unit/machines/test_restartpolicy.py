"""Docker's restart policies: which ends are followed by a start, and after how long."""

import pytest

from recess.errors import InvalidSpec
from recess.machines.restartpolicy import FIRST_S, LONGEST_S, SETTLED_S, decide, parse_policy


@pytest.mark.parametrize("text", ["sometimes", "always:3", "on-failure:x", "on-failure:-1", "no:1"])
def test_unknown_policies_are_refused(text):
    with pytest.raises(InvalidSpec):
        parse_policy(text)


@pytest.mark.parametrize(
    ("policy", "code", "done", "again"),
    [
        ("", 1, 0, False),
        ("no", 1, 0, False),
        ("always", 0, 0, True),
        ("unless-stopped", 0, 5, True),
        ("on-failure", 0, 0, False),
        ("on-failure", 1, 99, True),
        ("on-failure:2", 1, 1, True),
        ("on-failure:2", 1, 2, False),
    ],
)
def test_who_is_started_again(policy, code, done, again):
    assert (decide(policy, code, done, 0.0) is not None) is again


def test_waits_grow_and_begin_anew_after_a_settled_life():
    waits = [decide("always", 1, done, 0.0)[1] for done in range(30)]
    assert waits[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_S
    assert decide("always", 1, 30, SETTLED_S) == (1, FIRST_S)
    assert decide("on-failure:3", 1, 2, SETTLED_S) == (3, 4 * FIRST_S)  # a count is a count
