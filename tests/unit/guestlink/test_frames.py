import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recess.guestlink.frames import HEADER_LEN, MAGIC, MAX_PAYLOAD, PAD, Decoder, Frame, Garbage, encode

FRAME = st.builds(Frame, st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300))
NOISE = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from([MAGIC, MAGIC[:2], b"\0", b"R", b"\xff" * 12, b"\x05\0\x01\0"]), max_size=30).map(
        b"".join
    ),
)


def drain(decoder):
    items = []
    while (item := decoder.next()) is not None:
        items.append(item)
    return items


def cut(data, sizes):
    at = 0
    for size in sizes:
        yield data[at : at + size]
        at += size
    yield data[at:]


@given(
    st.lists(FRAME, max_size=8), st.lists(st.integers(1, 400), max_size=20), st.lists(st.integers(0, 40), max_size=8)
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames, sizes, pads):
    data = b"".join(
        encode(f.kind, f.flags, f.stream, f.payload) + bytes(pads[i % len(pads)] if pads else 0)
        for i, f in enumerate(frames)
    )
    decoder, got = Decoder(), []
    for piece in cut(data, sizes):
        decoder.feed(piece)
        got += drain(decoder)
    assert got == frames


@given(st.lists(NOISE, max_size=30))
def test_random_bytes_never_raise_and_little_is_held(pieces):
    decoder = Decoder()
    for piece in pieces:
        decoder.feed(piece)
        drain(decoder)
        assert decoder.held_bytes <= HEADER_LEN + MAX_PAYLOAD


@given(NOISE, FRAME)
def test_padding_and_a_frame_behind_any_noise_are_found(noise, frame):
    decoder = Decoder()
    decoder.feed(noise)
    found = drain(decoder)
    decoder.feed(PAD + encode(frame.kind, frame.flags, frame.stream, frame.payload))
    assert drain(decoder)[-1] == frame
    assert all(isinstance(item, Frame | Garbage) for item in found)


@given(FRAME, st.data())
def test_one_flipped_bit_never_gives_another_frame(frame, data):
    good = encode(frame.kind, frame.flags, frame.stream, frame.payload)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << (bit % 8)
    decoder = Decoder()
    decoder.feed(bytes(bad))
    assert not [item for item in drain(decoder) if isinstance(item, Frame) and item.payload == frame.payload]


def test_a_length_over_the_cap_is_not_waited_for():
    decoder = Decoder()
    decoder.feed(MAGIC + b"\x05\0\xff\xff" + bytes(8))
    assert decoder.next() == Garbage()
    with pytest.raises(ValueError, match="payload"):
        encode(5, 0, 1, bytes(MAX_PAYLOAD + 1))


@pytest.mark.parametrize("noise", [b"\0R\0", b"RxRx", b"\0x"], ids=["padding", "magic", "both"])
def test_hostile_bytes_cost_their_length_only(noise):
    """Skipping by twos must not read the whole rest each time: so, a MiB took over 20 s."""
    begun = time.process_time()
    decoder = Decoder()
    decoder.feed(noise * (MAX_PAYLOAD * 32 // len(noise)))
    drain(decoder)
    assert time.process_time() - begun < 8


def test_the_checksum_is_zlibs():
    data = encode(10, 0, 1, b"12345678")
    assert int.from_bytes(data[12:16], "little") == zlib.crc32(data[4:12] + b"12345678")
