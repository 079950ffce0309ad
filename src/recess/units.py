"""Sizes, durations and times as people write them ("512M", "30s") and as people read them. Bytes are int, seconds are float."""

from __future__ import annotations

import re
from datetime import UTC, datetime

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


def parse_moment(text: str, now_s: float) -> float:
    """Return a wall time in seconds since 1970 for Docker's ways to say one: a time ago ("10m"), a date and time
    ("2026-11-23T10:20:30Z", without a zone the local one), or seconds since 1970. Raises BadInput."""
    stripped = text.strip()
    if re.fullmatch(r"0|\d{9,12}(\.\d{1,9})?", stripped):
        return float(stripped)
    if re.match(r"\d{4}-\d", stripped):
        try:
            return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", stripped[:_DIGITS_MAX])).timestamp()
        except (ValueError, OverflowError) as exc:
            raise BadInput(f"not a time: {text!r}", hint="write it like 10m (ago) or 2026-11-23T10:20:30Z") from exc
    return now_s - parse_duration(stripped)


def format_moment(at_ns: int) -> str:
    """Return a wall time in ns as Docker's logs have it, in UTC: "2026-11-23T10:20:30.123456789Z"; "-" for 0, an unknown one."""
    if at_ns <= 0:
        return "-"
    seconds, rest = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


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
