"""Sizes and durations as people write them ("512M", "30s") and as people read them. Bytes are int, seconds are float."""

from __future__ import annotations

import re

from recess.errors import BadInput

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
PAGE_BYTES = 4096

_DIGITS_MAX = 40  # longer ones are infinite as numbers
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SIZE_FACTOR = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}
_DURATION_FACTOR = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str | int) -> int:
    """Return bytes for "512M", "2GiB", "4096" (binary factors, as Docker has them). Raises BadInput."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    if match is None or len(match[1]) > _DIGITS_MAX:
        raise BadInput(f"not a size: {text[:_DIGITS_MAX]!r}", hint="write a number and k, M or G, like 512M")
    return int(float(match[1]) * _SIZE_FACTOR[match[2].lower()])


def parse_duration(text: str | float) -> float:
    """Return seconds for "30s", "1h30m", "500ms" or a bare number of seconds. Raises BadInput."""
    if isinstance(text, int | float):
        return float(text)
    stripped = text.strip()
    if len(stripped) > _DIGITS_MAX:
        raise BadInput(f"not a duration: {stripped[:_DIGITS_MAX]!r}...", hint="write it like 30s, 5m or 1h30m")
    if re.fullmatch(r"\d+(\.\d+)?", stripped):
        return float(stripped)
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", stripped):
        raise BadInput(f"not a duration: {text!r}", hint="write it like 30s, 5m or 1h30m")
    return sum(float(m[1]) * _DURATION_FACTOR[m[2]] for m in _DURATION.finditer(stripped))


def format_bytes(count: int) -> str:
    """Return bytes for people: decimal megabytes as in the figures, "3.4 MB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Return a duration for people: "21 ms", "3.2 s", "4 min 10 s"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
