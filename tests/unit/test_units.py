"""Sizes and durations, both ways."""

import pytest

from recess.errors import BadInput
from recess.units import format_bytes, format_duration, format_moment, parse_duration, parse_moment, parse_size


@pytest.mark.parametrize(
    ("text", "expected"), [("512M", 512 << 20), ("2GiB", 2 << 30), ("4096", 4096), ("1.5k", 1536), (7, 7)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("30s", 30), ("1h30m", 5400), ("500ms", 0.5), ("2", 2), (3, 3)])
def test_durations(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "12 parsecs", "9" * 400])
def test_nonsense_is_refused(text):
    with pytest.raises(BadInput):
        parse_size(text)
    with pytest.raises(BadInput):
        parse_duration(text)


def test_formats():
    assert format_bytes(999) == "999 B"
    assert format_bytes(3_400_000) == "3.4 MB"
    assert format_bytes(5_000_000_000_000) == "5000.0 GB"
    assert format_duration(0.0214) == "21 ms"
    assert format_duration(3.21) == "3.2 s"
    assert format_duration(250) == "4 min 10 s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10m", 999_999_400),
        ("0", 0),
        ("999999999.5", 999_999_999.5),
        ("2001-09-09T01:46:41Z", 1_000_000_001),
        ("2001-09-09T01:46:41.123456789+00:00", 1_000_000_001.123456),
        ("2001-09-09T03:46:41+02:00", 1_000_000_001),
    ],
)
def test_moments(text, expected):
    assert parse_moment(text, 1_000_000_000) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("text", ["", "yesterday", "2001-13-01", "2001-09-09T99:00", "1e9"])
def test_what_is_no_moment(text):
    with pytest.raises(BadInput):
        parse_moment(text, 0)


def test_a_moment_as_logs_have_it():
    assert format_moment(1_700_000_000_000_000_001) == "2023-11-14T22:13:20.000000001Z"
    assert format_moment(0) == "-"
