"""The error tree: codes are unique, every class says what it means."""

import pytest

from recess.errors import Fenced, RecessError, Timeout, all_errors


def test_codes_are_unique_and_every_class_is_documented():
    classes = all_errors()
    assert len({c.code for c in classes}) == len(classes)
    assert all(c.__doc__ for c in classes)
    assert all(400 <= c.http_status < 600 and 1 <= c.exit_code < 126 for c in classes)


def test_the_tree_in_the_docstring_names_every_class():
    import recess.errors as module

    missing = [c.__name__ for c in all_errors() if c.__name__ not in (module.__doc__ or "")]
    assert missing == []


@pytest.mark.parametrize("cls", all_errors())
def test_errors_travel_as_data(cls):
    from recess.sdk.transport import error_from

    error = cls("it broke", hint="mend it", part="x")
    back = error_from(error.to_dict())
    assert type(back) is cls
    assert (back.message, back.hint, back.details) == ("it broke", "mend it", {"part": "x"})


def test_exit_codes_of_note():
    assert Timeout.exit_code == 124
    assert Fenced("x").to_dict() == {"code": "fenced", "message": "x", "hint": ""}
    assert type(error_of_unknown_code()) is RecessError


def error_of_unknown_code():
    from recess.sdk.transport import error_from

    return error_from({"code": "from_the_future", "message": "?"})
