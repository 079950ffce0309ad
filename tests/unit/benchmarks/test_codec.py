"""The codec benchmark's pure parts: the sample of a large guest, the table."""

import numpy as np

from benchmarks import codec
from benchmarks.codec import FRAMES, LEVELS, levels_of, markdown, sample
from recess.units import PAGE_BYTES

FACTS = {"date": "2026-11-23", "cpu": "a CPU"}


def numbered(count):
    pages = np.zeros((count, PAGE_BYTES), np.uint8)
    pages.view(np.uint64)[:, 0] = np.arange(count)
    return pages


def test_a_small_guest_is_taken_whole():
    pages = numbered(4 * 512)
    assert sample(pages, 8) is pages


def test_a_large_guest_is_sampled_evenly_and_scaled(monkeypatch):
    monkeypatch.setattr(codec, "LEVELS", (1,))
    pages = numbered(40 * 512)
    taken = sample(pages, 8).view(np.uint64)[:, 0]
    assert len(taken) == 4 * 512
    assert taken[0] == 0
    assert taken[-1] == 40 * 512 - 1
    whole = levels_of(sample(pages, 8), 8)[0]["bytes"]
    assert abs(levels_of(pages, 8)[0]["bytes"] - 10 * whole) <= 10


def test_the_table_has_every_level_and_says_who_was_skipped():
    one = {
        "stored": 3_600_000, "pages_new": 10, "raw_bytes": 19_000_000, "pages_shared": {"template": 5}, "levels": [
            {"level": level, "frame_bytes": FRAMES[0], "bytes": 1e6, "encode_mb_s": 100, "decode_mb_s": 500} for level in LEVELS
        ], "matched_bytes": 0, "stored_after_drop_caches": 3_700_000, "exported_bytes": 14_000_000,
    }  # fmt: skip
    text = markdown({"Python agent": one, "Node server": "skipped: npm is not installed: apt install npm"}, FACTS)
    assert "| level, frame | Python agent |" in text
    assert "| exported whole, template and all | 14.00 |" in text
    assert text.count("| 1.00 (100, 500) |") == len(LEVELS)
    assert "| stored after drop_caches | 3.70 |" in text
    too_slow = markdown({"Python agent": {**one, "stored_after_drop_caches": None}}, FACTS)
    assert "| stored after drop_caches | - |" in too_slow
    assert "- Node server: skipped: npm is not installed" in text
