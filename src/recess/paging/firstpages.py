"""The pages that a memory's machines touch first, as a short text that travels with a snapshot's manifest.

A hint and nothing more: what is damaged, foreign or out of date costs faults, never a wrong page. It must know nothing of
manifests or of who touched what.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable

import numpy as np

FIRST = "first"
"""Where a manifest's spec has them, by part."""

FIRST_MAX = 1024
"""Pages told of; each stands for what is fetched together with it (a frame of 64 KiB), and so for up to 64 MiB."""

_TEXT_MAX = 16384
_RAW_MAX = 4 * FIRST_MAX


def encode_first(pages: Iterable[int]) -> str:
    """Return the text of these pages, the first FIRST_MAX of them; "" for none. Their order is not kept."""
    kept = np.array(sorted(list(dict.fromkeys(pages))[:FIRST_MAX]), np.int64)
    if not len(kept):
        return ""
    steps = np.diff(kept, prepend=0).astype("<u4")  # small numbers, which compress
    return base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode()


def decode_first(text: object) -> list[int]:
    """Return the pages of a text, ascending; none if it is not one."""
    if not isinstance(text, str) or not text or len(text) > _TEXT_MAX:
        return []
    try:
        packed = zlib.decompressobj()
        raw = packed.decompress(base64.b64decode(text, validate=True), _RAW_MAX)
    except (ValueError, binascii.Error, zlib.error):
        return []
    steps = np.frombuffer(raw[: len(raw) // 4 * 4], "<u4").astype(np.int64)
    pages: list[int] = np.cumsum(steps).tolist()
    return pages
