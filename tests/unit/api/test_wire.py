"""JSON to specs and back; bad fields are named."""

import pytest

from recess.api.wire import parse_spec
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
    ],
)
def test_bad_fields_are_refused(data):
    with pytest.raises(BadInput) as caught:
        parse_spec(data)
    assert next(iter(data)).split("_")[0] in caught.value.message or "size" in caught.value.message
