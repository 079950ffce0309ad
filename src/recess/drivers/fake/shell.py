"""A very small `sh` for fake guests: enough to write a test's or a demo's one-liner, no more.

Knows `;` newline `&&` `||` `|` `&`, redirections `> >> < 2> 2>&1`, quotes, `$NAME`, `${NAME}`, `$?`, `$$`,
`$(command)`, `NAME=value`, `while/until LIST; do LIST; done`, `if LIST; then LIST; else LIST; fi`, `exit`, `cd`,
`export`, `wait`. What it does not know is a syntax error (exit 2), never a wrong result.
Parsing is pure; running goes through the process of `recess.drivers.fake.guest`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_OPERATORS = ("2>&1", "&&", "||", ">>", "2>", ";", "|", "&", ">", "<", "\n")
_ASSIGN = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*=")


class SyntaxProblem(Exception):
    """The script is not in our small language; the text says what was met."""


@dataclass(frozen=True)
class Word:
    """One word as pieces: (text, quoted-literally). A piece that is not literal may hold expansions."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def bare(self) -> str:
        """The text when it was written plainly, else ''."""
        return self.pieces[0][0] if len(self.pieces) == 1 and not self.pieces[0][1] else ""


@dataclass(frozen=True)
class Simple:
    """One command with its redirections (operator, target)."""

    words: tuple[Word, ...]
    redirects: tuple[tuple[str, Word | None], ...] = ()


@dataclass(frozen=True)
class Loop:
    """while (or until) `condition` do `body`."""

    condition: Script
    body: Script
    until: bool


@dataclass(frozen=True)
class Branch:
    """if `condition` then `body` else `other`."""

    condition: Script
    body: Script
    other: Script


@dataclass(frozen=True)
class Pipeline:
    """Commands joined by `|`; `joiner` is what stood before it (";", "&&" or "||"), `background` an `&` after it."""

    commands: tuple[Simple | Loop | Branch, ...]
    joiner: str
    background: bool = False


@dataclass(frozen=True)
class Script:
    """A list of pipelines."""

    items: tuple[Pipeline, ...] = field(default=())


def _substitution_end(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise SyntaxProblem("unterminated $(")


def tokenize(text: str) -> list[Word | str]:
    """Return words and operators (as plain strings)."""
    out: list[Word | str] = []
    pieces: list[tuple[str, bool]] = []
    i = 0

    def flush() -> None:
        if pieces:
            out.append(Word(tuple(pieces)))
            pieces.clear()

    def add(piece: str, literal: bool) -> None:
        if pieces and pieces[-1][1] == literal and not literal:
            pieces[-1] = (pieces[-1][0] + piece, literal)
        else:
            pieces.append((piece, literal))

    while i < len(text):
        char = text[i]
        operator = next((op for op in _OPERATORS if text.startswith(op, i)), "")
        if operator.startswith("2") and pieces:
            operator = ""
        if operator:
            flush()
            out.append(operator)
            i += len(operator)
        elif char in " \t":
            flush()
            i += 1
        elif char == "#" and not pieces:
            i = text.find("\n", i) if "\n" in text[i:] else len(text)
        elif char == "'":
            end = text.find("'", i + 1)
            if end < 0:
                raise SyntaxProblem("unterminated quote")
            add(text[i + 1 : end], True)
            i = end + 1
        elif char == '"':
            i = _double_quoted(text, i + 1, add)
        elif char == "\\" and i + 1 < len(text):
            if text[i + 1] != "\n":
                add(text[i + 1], True)
            i += 2
        elif text.startswith("$(", i):
            end = _substitution_end(text, i + 1)
            add(text[i:end], False)
            i = end
        else:
            add(char, False)
            i += 1
    flush()
    return out


def _double_quoted(text: str, i: int, push: Callable[[str, bool], None]) -> int:
    push("", True)  # an empty pair of quotes is still a word
    start = i
    while i < len(text) and text[i] != '"':
        if text[i] == "\\" and i + 1 < len(text) and text[i + 1] in '"\\$`':
            if i > start:
                push(text[start:i], False)
            push(text[i + 1], True)
            i += 2
            start = i
        elif text.startswith("$(", i):
            i = _substitution_end(text, i + 1)
        else:
            i += 1
    if i >= len(text):
        raise SyntaxProblem("unterminated quote")
    if i > start:
        push(text[start:i], False)
    return i + 1


class _Parser:
    def __init__(self, tokens: list[Word | str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> Word | str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def bare(self) -> str:
        token = self.peek()
        return token.bare if isinstance(token, Word) else ""

    def skip_separators(self) -> None:
        while self.peek() in (";", "\n"):
            self.at += 1

    def script(self, enders: frozenset[str]) -> Script:
        items: list[Pipeline] = []
        joiner = ";"
        while True:
            self.skip_separators()
            if self.peek() is None or self.bare() in enders:
                break
            commands = [self.command()]
            while self.peek() == "|":
                self.at += 1
                commands.append(self.command())
            background = self.peek() == "&"
            items.append(Pipeline(tuple(commands), joiner, background))
            token = self.peek()
            joiner = token if isinstance(token, str) and token in ("&&", "||") else ";"
            if token in ("&&", "||", "&", ";", "\n"):
                self.at += 1
            elif token is not None and self.bare() not in enders:
                raise SyntaxProblem(f"unexpected {token!r}")
        return Script(tuple(items))

    def expect(self, word: str) -> None:
        if self.bare() != word:
            raise SyntaxProblem(f"expected {word}")
        self.at += 1

    def command(self) -> Simple | Loop | Branch:
        head = self.bare()
        if head in ("while", "until"):
            self.at += 1
            condition = self.script(frozenset({"do"}))
            self.expect("do")
            body = self.script(frozenset({"done"}))
            self.expect("done")
            return Loop(condition, body, head == "until")
        if head == "if":
            self.at += 1
            condition = self.script(frozenset({"then"}))
            self.expect("then")
            body = self.script(frozenset({"else", "fi"}))
            other = Script()
            if self.bare() == "else":
                self.at += 1
                other = self.script(frozenset({"fi"}))
            self.expect("fi")
            return Branch(condition, body, other)
        if head in ("for", "case", "function", "{", "(", "elif"):
            raise SyntaxProblem(f"{head} is not supported by the fake driver's sh")
        return self.simple()

    def simple(self) -> Simple:
        words: list[Word] = []
        redirects: list[tuple[str, Word | None]] = []
        while (token := self.peek()) is not None:
            if isinstance(token, Word):
                words.append(token)
            elif token == "2>&1":
                redirects.append((token, None))
            elif token in (">", ">>", "<", "2>"):
                self.at += 1
                target = self.peek()
                if not isinstance(target, Word):
                    raise SyntaxProblem(f"{token} needs a file")
                redirects.append((token, target))
            else:
                break
            self.at += 1
        if not words and not redirects:
            raise SyntaxProblem(f"unexpected {self.peek()!r}")
        return Simple(tuple(words), tuple(redirects))


def parse(text: str) -> Script:
    """Return the script's tree; raises SyntaxProblem."""
    return _Parser(tokenize(text)).script(frozenset())


def is_assignment(word: Word) -> bool:
    """Tell whether a word is NAME=value."""
    return bool(word.pieces) and not word.pieces[0][1] and _ASSIGN.match(word.pieces[0][0]) is not None
