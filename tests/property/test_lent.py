"""A lent transcript is a list like any other, whatever is done to it, and what was lent stays as it was."""

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recess_agent.lent import Lent

PLACE = st.integers(-9, 9)
SLICE = st.builds(slice, st.none() | PLACE, st.none() | PLACE, st.none() | st.sampled_from([1, 2, -1]))


def fresh(mark):
    return {"role": "user", "content": mark}


# Each takes a list and a place (or a slice), and returns what the caller gets hold of.
READS = {
    "index": lambda m, at: [m[at]],
    "slice": lambda m, at: m[at],
    "for": lambda m, at: [one for one in m],  # noqa: C416 - the loop is what is tried
    "list": lambda m, at: list(m),
    "unpack": lambda m, at: [fresh("first"), *m],
    "reversed": lambda m, at: list(reversed(m)),
    "one of reversed": lambda m, at: [next(reversed(m))],
    "copy": lambda m, at: m.copy(),
    "sorted": lambda m, at: sorted(m, key=lambda one: one["content"]),
    "tuple": lambda m, at: list(tuple(m)),  # noqa: C414 - by way of a tuple
    "plus": lambda m, at: m + [fresh("last")],  # noqa: RUF005
    "plus it": lambda m, at: [fresh("first")] + m,  # noqa: RUF005
    "times": lambda m, at: m * 2,
    "copied": lambda m, at: list(copy.copy(m)),
    "deep": lambda m, at: copy.deepcopy(m),
    "pickled": lambda m, at: pickle.loads(pickle.dumps(m)),
    "json": lambda m, at: json.loads(json.dumps(m)),
    "pop": lambda m, at: [m.pop()],
    "pop at": lambda m, at: [m.pop(at)],
}


def added(to, more):
    to += more


CHANGES = {
    "set": lambda m, at: m.__setitem__(at, fresh("set")),
    "set slice": lambda m, at: m.__setitem__(slice(1, 3), [fresh("s")] * 3),
    "del": lambda m, at: m.__delitem__(at),
    "del slice": lambda m, at: m.__delitem__(slice(1, 3)),
    "insert": lambda m, at: m.insert(at, fresh("inserted")),
    "append": lambda m, at: m.append(fresh("appended")),
    "extend": lambda m, at: m.extend([fresh("one"), fresh("two")]),
    "iadd": lambda m, at: added(m, [fresh("more")]),
    "remove": lambda m, at: m.remove(m[at]),
    "reverse": lambda m, at: m.reverse(),
    "sort": lambda m, at: m.sort(key=lambda one: one["content"]),
    "clear": lambda m, at: m.clear(),
}
STEP = st.one_of(
    st.tuples(st.sampled_from(sorted(READS.keys() - {"slice"})), PLACE),
    st.tuples(st.just("slice"), SLICE),
    st.tuples(st.sampled_from(sorted(CHANGES)), PLACE),
)


def outcome(work, *args):
    """What it returned, or the kind of error."""
    try:
        return work(*args), None
    except (IndexError, ValueError, StopIteration) as exc:
        return None, type(exc)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 5), st.integers(0, 3), st.lists(STEP, max_size=8), st.booleans())
def test_it_is_a_list_and_what_was_lent_is_never_changed(kept, own, steps, spoil):
    lent = [fresh(f"kept {n}") for n in range(kept)]
    before = copy.deepcopy(lent)
    plain = copy.deepcopy(lent) + [fresh(f"own {n}") for n in range(own)]
    ours = Lent(lent, copy.deepcopy(plain[kept:]), dict)
    for name, at in steps:
        work = READS.get(name) or CHANGES[name]
        (wanted, error), (got, same) = outcome(work, plain, at), outcome(work, ours, at)
        assert (got, same) == (wanted, error)
        if spoil:
            for result in (wanted, got):
                for one in result or ():
                    one["content"] = one["content"] + "!"
        assert ours == plain
        assert len(ours) == len(plain)
        assert lent == before


def test_a_message_reached_twice_is_one_and_the_same():
    ours = Lent([fresh("a"), fresh("b")], [fresh("c")], dict)
    ours[0]["content"] = "changed"
    assert ours[0] is ours[-3] is next(iter(ours))
    assert [one["content"] for one in ours] == ["changed", "b", "c"]


def test_looking_at_its_end_copies_no_more_than_that():
    copied = []
    ours = Lent([fresh(str(n)) for n in range(1000)], [fresh("end")], lambda one: copied.append(one) or dict(one))
    assert len(ours) == 1001
    assert ours[-1]["content"] == "end"
    assert next(n for n, one in enumerate(reversed(ours)) if one["content"] == "990") == 10
    assert [one["content"] for one in ours[-3:]] == ["998", "999", "end"]
    ours.append(fresh("mine"))
    assert len(copied) == 10


@pytest.mark.parametrize("place", [3, -4])
def test_there_is_nothing_outside_of_it(place):
    with pytest.raises(IndexError):
        Lent([fresh("a")], [fresh("b"), fresh("c")], dict)[place]
