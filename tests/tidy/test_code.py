"""The shape of the code, checked: sizes, docstrings, words, import contracts."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [p for top in ("src/recess", "agent", "benchmarks", "tools") for p in sorted((ROOT / top).rglob("*.py"))]
SOURCES = [p for p in SOURCES if "_agent" not in p.parts]  # a link to agent/
RUST = [p for p in sorted((ROOT / "guest").rglob("*.rs")) if "target" not in p.parts]
MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 70
MAX_ROOT_ENTRIES = 16
MAX_EXPORTS = 20
# Written in two halves, so that this file passes its own check.
NEVER = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error", "assert " + "True\\b"]))
NOT_OUR_WORDS = re.compile(r"\b(check" + "point|sand" + r"box)(s|ing|ed)?\b", re.IGNORECASE)
FOREIGN_PATHS = re.compile("/wo" + "rk/|/ro" + "ot/\\.|/fa" + "rm/")


def tracked() -> list[Path]:
    """Return the files of the project as git knows them, new ones included."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [p for p in (ROOT / line for line in done.stdout.splitlines()) if p.is_file() and not p.is_symlink()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_there_is_something_to_check():
    assert len(SOURCES) > 50
    assert RUST


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_module_is_short_documented_and_made_of_short_functions(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    assert not text.strip() or ast.get_docstring(tree), "no module docstring"
    for function in functions(tree):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"


@pytest.mark.parametrize("path", [p for p in SOURCES if "testing" not in p.parts], ids=relative)
def test_what_is_public_is_documented(path):
    assert undocumented(ast.parse(path.read_text())) == []


def undocumented(tree: ast.Module) -> list[str]:
    """Return public classes and functions of a module, and public methods of its public classes, without docstring."""
    found: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [] if ast.get_docstring(node) else [node.name]
            members = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            public = [n for n in members if not n.name.startswith("_") and not _implements(n)]
            found += [f"{node.name}.{n.name}" for n in public if not ast.get_docstring(n)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            found += [] if ast.get_docstring(node) else [node.name]
    return found


def _implements(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Setters and overloads share their getter's or implementation's docstring."""
    return any(isinstance(d, ast.Attribute | ast.Name) and ast.unparse(d).endswith(("setter", "overload"))
               for d in node.decorator_list)  # fmt: skip


def test_the_docstring_check_finds_what_is_missing():
    tree = ast.parse(
        "class A:\n    '''x'''\n    def f(self): pass\n    def _g(self): pass\ndef h(): pass\nclass B: pass\n"
    )
    assert undocumented(tree) == ["A.f", "h", "B"]


@pytest.mark.parametrize("path", RUST, ids=relative)
def test_a_rust_file_is_short_and_says_what_it_is_for(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    assert text.startswith("//!")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=relative)
def test_a_package_index_is_small(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            assert len(ast.literal_eval(node.value)) <= MAX_EXPORTS


def test_no_left_over_marks():
    shipped = [p for p in [*SOURCES, *RUST] if "testing" not in p.parts]
    bad = [f"{relative(p)}: {m[0]}" for p in shipped for m in NEVER.finditer(p.read_text())]
    assert bad == []


def test_words_of_other_houses_are_not_used():
    docs = [p for p in tracked() if p.suffix == ".md" and p.parts[-2:] != ("docs", "glossary.md")]
    rows = [f"{relative(p)}: {m[0]}" for p in [*SOURCES, *docs] for m in NOT_OUR_WORDS.finditer(_plain(p.read_text()))]
    theirs = ("docs/decisions/", "CHANGELOG", "docs/comparison", "src/recess/adapters/", "docs/adapters.md")
    theirs += ("agent/recess_agent/memory_", "benchmarks/session")  # a framework's own names
    assert [r for r in rows if not r.startswith(theirs)] == []


def _plain(text: str) -> str:
    """Drop what quotes other programs' words: code, an option of apt, SQLite's own PRAGMA, runsc's command and file."""
    quoted = (
        r"`[^`]*`|APT::\w+|wal_\w+|isolation: .*|isolation=.*|-sand" + r'box|"check' + r'point"|check' + r"point\.img"
    )
    return re.sub(quoted, "", text, flags=re.IGNORECASE)


def test_no_path_of_a_developers_machine():
    bad = []
    for path in tracked():
        if path.suffix in (".py", ".rs", ".md", ".sh", ".toml", ".txt", ".json", ".yml") or path.name == "run":
            bad += [f"{relative(path)}: {m[0]}" for m in FOREIGN_PATHS.finditer(path.read_text(errors="replace"))]
    assert bad == []


def test_the_root_is_small():
    entries = {relative(p).split("/")[0] for p in tracked()}
    assert len([e for e in entries if not e.startswith(".")]) <= MAX_ROOT_ENTRIES, sorted(entries)


def test_only_config_reads_the_environment():
    """The exceptions: test helpers; a secret that is kept in the server's environment; `-e NAME` of Docker's verbs, where the
    user's environment is what is handed on; what is sent into a machine and runs there."""
    excepted = (
        "src/recess/config.py",
        "src/recess/broker/sources.py",
        "src/recess/cli/common.py",
        "src/recess/adapters/code_runner.py",
    )
    bad = [
        relative(p)
        for p in SOURCES
        if relative(p).startswith("src/recess/")
        and "testing" not in p.parts
        and relative(p) not in excepted
        and re.search(r"\bos\.(environ|getenv)\b", p.read_text())
    ]
    assert bad == []


def test_the_import_contracts_hold():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
