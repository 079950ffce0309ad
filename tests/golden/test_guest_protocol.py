"""The wire format is final: these frames, shared with guestd's own tests, must never change."""

import json
import struct
import zlib
from pathlib import Path

import pytest

from recess.guestlink.frames import Decoder, Frame, Garbage, Kind, encode

VECTORS = json.loads((Path(__file__).parents[2] / "guest" / "vectors" / "frames.json").read_text())


def names(cases):
    return [case["name"] for case in cases]


@pytest.mark.parametrize("case", VECTORS["frames"], ids=names(VECTORS["frames"]))
def test_frames(case):
    payload = bytes.fromhex(case["payload"])
    data = encode(case["type"], case["flags"], case["stream"], payload)
    assert data.hex() == case["bytes"]
    decoder = Decoder()
    decoder.feed(data)
    assert decoder.next() == Frame(case["type"], case["flags"], case["stream"], payload)
    assert decoder.next() is None


@pytest.mark.parametrize("step", [1, 7, 4096])
@pytest.mark.parametrize("case", VECTORS["resync"], ids=names(VECTORS["resync"]))
def test_resync(case, step):
    data, decoder, events = bytes.fromhex(case["input"]), Decoder(), []
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        while (item := decoder.next()) is not None:
            events.append("garbage" if isinstance(item, Garbage) else f"frame:{item.kind}:{item.stream}")
    assert events == case["events"]


def test_every_type_has_a_vector_and_the_layout_is_as_documented():
    assert {case["type"] for case in VECTORS["frames"]} == {int(kind) for kind in Kind}
    head = struct.pack("<BBHI", 5, 1, 3, 9)
    assert encode(5, 1, 9, b"abc") == b"RcG1" + head + struct.pack("<I", zlib.crc32(head + b"abc")) + b"abc"
