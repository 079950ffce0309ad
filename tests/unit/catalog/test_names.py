import pytest

from recess.catalog.names import check_name
from recess.errors import BadInput


@pytest.mark.parametrize("name", ["dev", "a1", "A.b_c-d", "0x", "x" * 128, "machine_1"])
def test_legal(name):
    assert check_name(name, "machine") == name
    assert check_name(name, "snapshot", tagged=True) == name


@pytest.mark.parametrize(
    "name", ["", "x", "x" * 129, " dev", "dev ", "dev\n", ".a", "_a", "a/b", "a:b", "ä1", "mch_1", "snp_x"]
)
def test_illegal_with_a_hint(name):
    with pytest.raises(BadInput) as caught:
        check_name(name, "machine")
    assert caught.value.hint
    assert "\n" not in caught.value.message
