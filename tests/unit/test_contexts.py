"""Contexts: which one is meant, where it leads, and that its file keeps a token to its user."""

import stat

import pytest

from recess.config import contexts_path, load_config
from recess.contexts import DEFAULT, Book, Place, load_book, save_book
from recess.errors import BadInput, Corrupt, NotFound


@pytest.fixture
def env(tmp_path):
    found = {"HOME": str(tmp_path)}
    book = Book().with_place("lab", Place(home=str(tmp_path / "lab")))
    save_book(contexts_path(found), book.with_place("far", Place(url="http://far:1", token="t")))
    return found


def test_the_file_is_the_users_own(env):
    path = contexts_path(env)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_book(path).places["far"] == Place(url="http://far:1", token="t")
    assert "t'" not in repr(Place(url="http://far:1", token="t"))
    assert [p.name for p in path.parent.iterdir()] == ["contexts.json"]
    path.write_text("{")
    with pytest.raises(Corrupt):
        load_config(env)


def test_which_context_is_meant(env, tmp_path):
    def chosen(more=(), **overrides):
        config = load_config({**env, **dict(more)}, **overrides)
        return config.context, config.home, config.url, config.token

    own = tmp_path / ".local" / "share" / "recess"
    assert chosen() == (DEFAULT, own, "", "")
    assert chosen({"RECESS_CONTEXT": "lab"}) == ("lab", tmp_path / "lab", "", "")
    assert chosen(context="far") == ("far", own, "http://far:1", "t")
    save_book(contexts_path(env), load_book(contexts_path(env)).using("far"))
    assert chosen() == ("far", own, "http://far:1", "t")
    assert chosen(context="lab") == ("lab", tmp_path / "lab", "", "")
    assert chosen(context=DEFAULT) == (DEFAULT, own, "", "")
    assert chosen({"RECESS_HOME": "/h"})[1:3] == chosen(home="/h")[1:3]
    assert chosen({"RECESS_URL": "http://x"})[2] == "http://x"
    assert chosen({"RECESS_URL": "http://x"}, context="lab")[1:3] == (tmp_path / "lab", "")
    with pytest.raises(NotFound, match="no such context"):
        chosen(context="nowhere")
    assert load_config({}).context == ""  # no place for contexts: none


def test_what_is_refused():
    book = Book().with_place("lab", Place(home="/lab")).using("lab")
    for name, place in (
        ("default", Place(home="/x")), ("a/b", Place(home="/x")), ("", Place(home="/x")), ("x", Place()),
        ("x", Place(home="/x", url="http://x")), ("x", Place(url="ftp://x")),
    ):  # fmt: skip
        with pytest.raises(BadInput):
            book.with_place(name, place)
    for name in ("lab", "default"):
        with pytest.raises(BadInput):
            book.without(name)
    with pytest.raises(NotFound):
        book.without("other")
    assert dict(book.using(DEFAULT).without("lab").places) == {}
