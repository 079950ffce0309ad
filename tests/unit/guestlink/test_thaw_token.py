"""A token travels with the thaw where guestd takes it, and before the thaw where the guestd of an old snapshot does not."""

import pytest

from recess.errors import GuestFailed
from recess.guestlink import wire
from recess.guestlink.client import Link
from recess.guestlink.link import TOKEN_PATH, Thaw

THAW = Thaw(1, b"e" * 32, "gen", 3, "dev", "mch_1", token="rcm_new")


class Scripted(Link):
    """A link whose guest is a list of what it was asked."""

    def __init__(self, takes, full=False):
        self.hello = wire.Hello(wire.PROTO, "nonce", takes=takes)
        self.full = full
        self.asked = []

    async def request(self, body, timeout_s=0.0):
        self.asked.append((body["op"], body.get("token")))

    async def write_file(self, path, data, mode=0o644):
        if self.full:
            raise GuestFailed("no room")
        self.asked.append((path, data))


async def test_one_message_where_guestd_takes_it():
    link = Scripted(["something newer", "token"])
    await link.thaw(THAW)
    assert link.asked == [("thaw", "rcm_new")]


async def test_written_before_the_thaw_for_an_older_guestd():
    link = Scripted([])
    await link.thaw(THAW)
    assert link.asked == [(TOKEN_PATH, b"rcm_new"), ("thaw", None)]


async def test_no_thaw_without_its_token():
    link = Scripted([], full=True)
    with pytest.raises(GuestFailed):
        await link.thaw(THAW)
    assert link.asked == []


def test_a_token_is_not_shown():
    assert "rcm_new" not in repr(THAW)
    assert wire.decode(b'{"proto":1,"nonce":"n"}', wire.Hello, "hello").takes == []
