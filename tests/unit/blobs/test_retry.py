"""Trying again: what is worth it, how long, and when to stop. No real waiting."""

import pytest

from recess.blobs import MemoryBlobs, RetryingBlobs, RetryPolicy
from recess.blobs.retry import wait_before
from recess.errors import Corrupt, NotFound, Unavailable


class Flaky(MemoryBlobs):
    """Fails the next `failures` calls of get and put_stream, and breaks listings off after `give` items."""

    def __init__(self, failures=0, *, retryable=True):
        super().__init__()
        self.failures = failures
        self.retryable = retryable
        self.calls = 0

    def _maybe_fail(self):
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise Unavailable("a bad moment", retryable=self.retryable)

    def get(self, key, *, max_bytes):
        self._maybe_fail()
        return super().get(key, max_bytes=max_bytes)

    def put_stream(self, key, source):
        content = list(source())
        self._maybe_fail()
        return self.put(key, content)

    def list_blobs(self, prefix=""):
        for number, info in enumerate(super().list_blobs(prefix)):
            if number == 2:
                self._maybe_fail()
            yield info


class Time:
    """A clock that moves only by being waited on."""

    def __init__(self):
        self.now = 0.0
        self.waits = []

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


def make(inner, policy=RetryPolicy(), chance=1.0):  # noqa: B008 - frozen
    time = Time()
    store = RetryingBlobs(inner, policy, wait=time.wait, monotonic=lambda: time.now, chance=lambda: chance)
    return store, time


def test_waits_grow_to_a_cap_and_jitter_is_full():
    policy = RetryPolicy(first_s=0.1, most_s=1.0)
    assert [wait_before(policy, n, 1.0) for n in range(1, 7)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert wait_before(policy, 3, 0.0) == 0.0
    assert wait_before(policy, 3, 0.5) == pytest.approx(0.2)
    assert wait_before(policy, 2000, 1.0) == 1.0  # no overflow


def test_a_passing_failure_is_waited_out():
    inner = Flaky(3)
    inner.put("k", b"x")
    store, time = make(inner)
    assert store.get("k", max_bytes=1) == b"x"
    assert inner.calls == 4
    assert time.waits == pytest.approx([0.1, 0.2, 0.4])


def test_tries_have_a_cap():
    inner = Flaky(100)
    store, time = make(inner, RetryPolicy(tries=4))
    with pytest.raises(Unavailable) as caught:
        store.get("k", max_bytes=1)
    assert caught.value.details["tries"] == inner.calls == 4
    assert len(time.waits) == 3


def test_time_has_a_cap():
    inner = Flaky(100)
    store, time = make(inner, RetryPolicy(tries=100, first_s=1.0, most_s=4.0, total_s=10.0))
    with pytest.raises(Unavailable):
        store.get("k", max_bytes=1)
    assert time.now <= 10.0
    assert inner.calls == 4  # after 1 + 2 + 4 seconds the next wait would end at 11


@pytest.mark.parametrize("blocked", [Unavailable("no such bucket", retryable=False), Unavailable("EIO")])
def test_what_does_not_pass_is_not_tried_again(blocked):
    class Broken(MemoryBlobs):
        calls = 0

        def exists(self, key):
            self.calls += 1
            raise blocked

    inner = Broken()
    store, time = make(inner)
    with pytest.raises(Unavailable):
        store.exists("k")
    assert (inner.calls, time.waits) == (1, [])


def test_meaning_is_not_tried_again():
    inner = Flaky()
    inner.put("k", b"xx")
    store, time = make(inner)
    with pytest.raises(NotFound):
        store.get("no", max_bytes=1)
    with pytest.raises(Corrupt):
        store.get("k", max_bytes=1)
    assert (inner.calls, time.waits) == (2, [])


def test_a_stream_is_taken_from_its_beginning():
    store, _ = make(Flaky(2))
    taken = []

    def source():
        taken.append(True)
        yield b"ab"
        yield b"cd"

    assert store.put_stream("k", source) is True
    assert len(taken) == 3
    assert store.get("k", max_bytes=4) == b"abcd"


def test_a_listing_goes_on_without_doubles():
    inner = Flaky(2)
    for name in "abcde":
        inner.put(name, b"")
    store, time = make(inner)
    assert [info.key for info in store.list_blobs()] == list("abcde")
    assert len(time.waits) == 2


def test_a_listing_gives_up():
    inner = Flaky(1000)
    for name in "abc":
        inner.put(name, b"")
    store, _ = make(inner, RetryPolicy(tries=3))
    with pytest.raises(Unavailable):
        list(store.list_blobs())
