"""The hint of what is touched first: short, bounded, and never an error."""

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.paging.firstpages import FIRST_MAX, decode_first, encode_first


@given(st.lists(st.integers(0, (1 << 28) - 1), max_size=200))
def test_it_comes_back_ascending(pages):
    assert decode_first(encode_first(pages)) == sorted(set(pages))


def test_it_is_bounded_and_short():
    pages = range(0, 20 * 5 * FIRST_MAX, 20)
    text = encode_first(pages)
    assert decode_first(text) == list(pages[:FIRST_MAX])
    assert len(text) < 200
    assert encode_first([]) == ""


@pytest.mark.parametrize(
    "text",
    [None, 7, {}, "", "?", "AAAA", "x" * 20000, base64.b64encode(b"no zlib").decode(), encode_first([1, 2])[:-4]],
)
def test_nonsense_is_no_hint(text):
    assert decode_first(text) in ([], [1, 2])


def test_a_bomb_is_cut():
    bomb = base64.b64encode(zlib.compress(b"\x01\0\0\0" * 1_000_000, 9)).decode()
    assert len(decode_first(bomb)) == FIRST_MAX
