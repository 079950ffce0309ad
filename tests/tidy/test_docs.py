"""Docs that name something name something that exists."""

import re
from pathlib import Path

import pytest

from recess.errors import all_errors

ROOT = Path(__file__).parents[2]
DOCS = [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if "changelog.d" not in p.parts]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path):
    links = [link for link in LINK.findall(path.read_text()) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_error_is_documented_with_its_code():
    text = (ROOT / "docs" / "errors.md").read_text()
    public = [e for e in all_errors() if e.__module__ == "recess.errors"]  # a room's own subclasses carry these codes
    missing = [e.__name__ for e in public if f"`{e.code}`" not in text]
    assert missing == []


def test_every_changelog_fragment_is_short():
    for path in (ROOT / "docs" / "changelog.d").glob("*.md"):
        assert 1 <= len(path.read_text().strip().splitlines()) <= 12, path.name


def test_the_make_targets_named_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(p.name, t) for p in DOCS for t in re.findall(r"`make ([a-z-]+)", p.read_text())}
    assert {(name, t) for name, t in named if t not in targets} == set()


def test_the_tests_named_in_the_docs_exist():
    """Each `path.py::test_name` in a document is a test there; each path without a name is a file."""
    wrong, seen = [], 0
    for path in DOCS:
        for named, test in re.findall(r"`((?:src|tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`", path.read_text()):
            file, seen = ROOT / named, seen + bool(test)
            if not file.is_file() or (test and f"def {test}(" not in file.read_text()):
                wrong.append((path.name, named, test))
    assert wrong == []
    assert seen > 50
