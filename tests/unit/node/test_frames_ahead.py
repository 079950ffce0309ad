"""Frames on their way: in the order of need, each once, as soon as its own request is answered; bounded."""

import threading

import numpy as np
import pytest

from recess.errors import Unavailable
from recess.node import frames_ahead
from recess.node.frames_ahead import FramesAhead, Manner

BOUND_S = 30.0
SIZE = 1000  # stored bytes of a frame


class Layer:
    """A layer whose frames hold their number. `asked`: the requests, in their order; `held`: requests for these wait."""

    def __init__(self, count):
        self.frame_count = count
        self.asked = []
        self.alone = []
        self.held = {}
        self.begun = threading.Semaphore(0)
        self.broken = False

    def hold(self, frame):
        self.held[frame] = threading.Event()
        return self.held[frame]

    def frames(self, numbers):
        self.asked.append(list(numbers))
        self.begun.release()
        for number in numbers:
            if number in self.held:
                assert self.held[number].wait(BOUND_S)
        if self.broken:
            raise Unavailable("the store is down")
        return {number: np.full((1, 4096), number % 251, np.uint8) for number in numbers}

    def frame(self, number):
        if self.broken:
            raise Unavailable("the store is still down")
        self.alone.append(number)
        return np.full((1, 4096), number % 251, np.uint8)

    def frame_bytes(self, number):
        return SIZE

    def frame_span(self, number):
        return number * SIZE, SIZE

    def frames_within(self, number, size):
        per = size // SIZE
        low = number // per * per
        return range(low, min(low + per, self.frame_count))


@pytest.fixture
def make():
    made = []

    def make_over(layer, *, wanted=None, readers=1, frames=4, gap=0, around=0):
        every = np.arange(layer.frame_count) if wanted is None else np.array(wanted)
        made.append(FramesAhead({1: layer}, {1: every}, Manner(readers, frames, gap, around)))
        return made[-1]

    yield make_over
    for one in made:
        one.close()


def number_in(found):
    return int(found[0][0, 0])


def test_what_is_needed_first_is_asked_for_first(make):
    layer = Layer(100)
    ahead = make(layer)
    last = layer.hold(3)
    ahead.expect([(1, n) for n in (50, 90, 51, 10, 3)])
    assert [number_in(ahead.get(1, n)) for n in (50, 51, 90, 10)] == [50, 51, 90, 10]
    last.set()
    assert number_in(ahead.get(1, 3)) == 3
    assert layer.asked == [[50, 51], [90], [10], [3]]
    assert layer.alone == []


def test_nobody_waits_for_a_request_that_has_not_begun(make):
    layer = Layer(100)
    slow = layer.hold(0)
    ahead = make(layer)  # one reader, which hangs
    ahead.expect([(1, 0), (1, 40), (1, 80)])
    assert layer.begun.acquire(timeout=BOUND_S)
    assert number_in(ahead.get(1, 80)) == 80
    assert number_in(ahead.get(1, 40)) == 40
    slow.set()
    assert number_in(ahead.get(1, 0)) == 0
    assert sorted(layer.asked) == [[0], [40], [80]]


def test_who_needs_a_frame_that_is_on_its_way_waits_for_it(make):
    layer = Layer(10)
    slow = layer.hold(5)
    ahead = make(layer)
    ahead.expect([(1, 5), (1, 6)])
    assert layer.begun.acquire(timeout=BOUND_S)
    found = []
    waiting = threading.Thread(target=lambda: found.append(ahead.get(1, 5)))
    waiting.start()
    slow.set()
    waiting.join(BOUND_S)
    assert number_in(found[0]) == 5
    assert layer.asked == [[5, 6]]


def test_an_unexpected_frame_brings_its_neighbours_which_are_counted_with_it(make):
    layer = Layer(20)
    ahead = make(layer, wanted=[n for n in range(20) if n != 9], around=4 * SIZE)
    assert ahead.get(1, 10)[1] == 3 * SIZE
    assert layer.asked == [[8, 10, 11]]  # 9 belongs to nobody here
    assert [ahead.get(1, n)[1] for n in (8, 11)] == [0, 0]
    ahead.get(1, 13)
    assert layer.asked[1:] == [[12, 13, 14]]
    ahead = make(layer, around=20 * SIZE)
    ahead.get(1, 10)
    assert layer.asked[2:] == [[8, 9, 10, 11]]  # no more than one request may bring


def test_what_went_wrong_ahead_is_read_alone_and_says_why_when_it_is_needed(make):
    layer = Layer(10)
    layer.broken = True
    ahead = make(layer)
    ahead.expect([(1, 2), (1, 3)])
    with pytest.raises(Unavailable, match="still down"):
        ahead.get(1, 2)
    layer.broken = False
    assert number_in(ahead.get(1, 3)) == 3


def test_what_nobody_takes_is_bounded_and_still_comes(make, monkeypatch):
    monkeypatch.setattr(frames_ahead, "READY_MAX", 16)
    layer = Layer(400)
    ahead = make(layer, readers=2)
    ahead.expect([(1, n) for n in range(400)])
    for _ in range(4):
        assert layer.begun.acquire(timeout=BOUND_S)
    assert len(ahead._ready) <= 16 + 3
    assert [number_in(ahead.get(1, n)) for n in range(400)] == [n % 251 for n in range(400)]
    assert sum(map(len, layer.asked)) == 400
    assert layer.alone == []
    ahead = make(Layer(4000), around=4 * SIZE)
    for n in range(0, 4000, 100):
        ahead.get(1, n)
    assert len(ahead._neighbours) == 16
    assert number_in(ahead.get(1, 1)) == 1


def test_many_at_once_get_what_they_asked_for(make):
    layer = Layer(300)
    ahead = make(layer, readers=4, around=8 * SIZE)
    ahead.expect([(1, n) for n in range(0, 300, 3)])
    wrong = []

    def take(low):
        wrong.extend(n for n in range(low, 300, 4) if number_in(ahead.get(1, n)) != n % 251)

    threads = [threading.Thread(target=take, args=(low,)) for low in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert wrong == []
    assert ahead._coming == {}
