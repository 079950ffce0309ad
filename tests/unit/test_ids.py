"""Ids: prefixed, sortable by time, never twice."""

from recess.ids import has_prefix, new_id


def test_ids_sort_by_time_and_never_repeat():
    ids = [new_id("mch", now_ms=1_000_000 + i) for i in range(100)]
    assert ids == sorted(ids)
    assert len({new_id("mch", now_ms=1) for _ in range(10_000)}) == 10_000


def test_form():
    assert has_prefix(new_id("ses"), "ses")
    assert not has_prefix(new_id("ses"), "mch")
    assert not has_prefix("ses_", "ses")
    assert not has_prefix("ses_../../x", "ses")
