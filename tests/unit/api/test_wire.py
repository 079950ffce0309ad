"""JSON to specs and back; bad fields are named."""

import pytest

from recess.api.wire import field, parse_object, parse_spec
from recess.errors import BadInput


def test_spec_takes_sizes_as_people_write_them():
    spec = parse_spec({"image": "base", "memory_bytes": "256M", "argv": ["true"], "ports": [["127.0.0.1", 0, 80]]})
    assert spec.memory_bytes == 256 << 20
    assert spec.ports == (("127.0.0.1", 0, 80),)


@pytest.mark.parametrize(
    "data",
    [
        {"imagee": "base"},
        {"argv": "true"},
        {"env": {"A": 1}},
        {"cpus": "two"},
        {"cpus": True},
        {"ports": [[80]]},
        {"ports": "80"},
        {"memory_bytes": "lots"},
        {"memory_bytes": True},
        {"memory_bytes": [1]},
        {"memory_bytes": "9" * 400},
        {"cpus": 10**30},
        {"ports": [["127.0.0.1", True, 80]]},
    ],
)
def test_bad_fields_are_refused(data):
    with pytest.raises(BadInput) as caught:
        parse_spec(data)
    assert next(iter(data)).split("_")[0] in caught.value.message or "size" in caught.value.message


def test_null_is_as_good_as_absent():
    assert parse_spec({"image": "base", "cpus": None, "memory_bytes": None, "env": None}) == parse_spec(
        {"image": "base"}
    )
    assert field({"names": None}, "names", list, []) == []


def test_numbers_nothing_can_hold_are_refused():
    with pytest.raises(BadInput, match="ttl_s"):
        field({"ttl_s": 10**400}, "ttl_s", float, 0.0)
    assert field({"ttl_s": 3}, "ttl_s", float, 0.0) == 3.0


@pytest.mark.parametrize(
    "raw", [b"{", b'{"a": NaN}', rb'{"a": "\ud800"}', b"[" * 200_000, b'{"a": "\xff"}', b"[]", b'{"a": 1e999}', ""]
)
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(BadInput, match="the body"):
        parse_object(raw, "the body")
