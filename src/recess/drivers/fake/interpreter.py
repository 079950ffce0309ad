"""Runs the small shell's trees inside a fake process.

What must survive a snapshot (variables, the folder, how far the script has come) is kept in the process's memory, so
a restored `sh` goes on with the top-level pipeline it was in; a loop begins its round anew.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.drivers.fake.guest import Process
from recess.drivers.fake.shell import Branch, Loop, Pipeline, Script, Simple, SyntaxProblem, Word, is_assignment, parse
from recess.guestlink.link import ExecRequest

_EXPANSION = re.compile(r"\$(\w+|\{\w+\}|\?|\$)")


@dataclass
class Io:
    """Where one command reads from and writes to; `None` output goes to the process itself."""

    stdin: bytes | None = None
    out: bytearray | None = None
    err: bytearray | None = None


@dataclass
class Call:
    """One builtin call: everything that a command may touch."""

    process: Process
    argv: list[str]
    env: dict[str, str]
    cwd: str
    io: Io = field(default_factory=Io)

    async def write(self, text: str | bytes, fd: int = 1) -> None:
        """Write to stdout or stderr, wherever they go."""
        data = text.encode() if isinstance(text, str) else text
        buffer = self.io.out if fd == 1 else self.io.err
        if buffer is not None:
            buffer += data
        else:
            await self.process.write(fd, data)

    async def read_all(self) -> bytes:
        """Read standard input to its end."""
        if self.io.stdin is not None:
            return self.io.stdin
        out = b""
        while chunk := await self.process.read():
            out += chunk
        return out

    def path(self, name: str) -> str:
        """Return an absolute path."""
        return self.process.guest.files.clean(name, self.cwd)


Builtin = Callable[[Call], Awaitable[int]]


class _Exit(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Interpreter:
    """One `sh`. `memory` is the process's own, plain data."""

    def __init__(self, process: Process, builtins: Mapping[str, Builtin], memory: dict[str, Any]) -> None:
        self.process = process
        self.builtins = builtins
        self.vars: dict[str, str] = memory.setdefault("vars", dict(process.job.env))
        self.memory = memory
        memory.setdefault("cwd", process.job.cwd)
        memory.setdefault("status", 0)

    async def run(self, text: str) -> int:
        """Run a script from where the memory says; returns its exit code."""
        try:
            script = parse(text)
        except SyntaxProblem as exc:
            await self.process.write(2, f"sh: {exc}\n".encode())
            return 2
        try:
            for index in range(self.memory.get("at", 0), len(script.items)):
                self.memory["at"] = index
                await self._item(script.items[index], Io())
        except _Exit as exc:
            return exc.code
        return int(self.memory["status"])

    async def _script(self, script: Script, io: Io) -> int:
        for item in script.items:
            await self._item(item, io)
        return int(self.memory["status"])

    async def _item(self, item: Pipeline, io: Io) -> None:
        status = int(self.memory["status"])
        if (item.joiner == "&&" and status != 0) or (item.joiner == "||" and status == 0):
            return
        if item.background:
            self._background(item)
            self.memory["status"] = 0
            return
        piped = io.stdin
        for command in item.commands[:-1]:
            out = bytearray()
            await self._command(command, Io(piped, out, io.err))
            piped = bytes(out)
        self.memory["status"] = await self._command(item.commands[-1], Io(piped, io.out, io.err))

    def _background(self, item: Pipeline) -> None:
        command = item.commands[0]
        if len(item.commands) > 1 or not isinstance(command, Simple):
            raise _Exit(2)
        argv = [w.pieces[0][0] for w in command.words]
        self.process.guest.exec(ExecRequest(argv=argv, env=self.vars, cwd=self.memory["cwd"], label="background"))

    async def _command(self, command: Simple | Loop | Branch, io: Io) -> int:
        if isinstance(command, Loop):
            while (await self._script(command.condition, io) == 0) != command.until:
                await self._script(command.body, io)
                await self.process.running()
            return 0
        if isinstance(command, Branch):
            chosen = command.body if await self._script(command.condition, io) == 0 else command.other
            self.memory["status"] = 0
            return await self._script(chosen, io)
        return await self._simple(command, io)

    async def _simple(self, command: Simple, io: Io) -> int:
        await self.process.running()
        words = list(command.words)
        assigned: dict[str, str] = {}
        while words and is_assignment(words[0]):
            name, _, value = (await self._expand(words.pop(0), split=False))[0].partition("=")
            assigned[name] = value
        argv = [text for word in words for text in await self._expand(word, split=True)]
        if not argv:
            self.vars.update(assigned)
        call = Call(self.process, argv, {**self.vars, **assigned}, self.memory["cwd"], Io(io.stdin, io.out, io.err))
        files: list[tuple[str, bytearray, bool]] = []
        for operator, target in command.redirects:
            if operator == "2>&1":
                call.io.err = call.io.out
                continue
            path = call.path((await self._expand(target, split=False))[0]) if target is not None else ""
            if operator == "<":
                call.io.stdin = self.process.guest.files.read(path)
                continue
            buffer = bytearray()
            call.io.out, call.io.err = (call.io.out, buffer) if operator == "2>" else (buffer, call.io.err)
            files.append((path, buffer, operator == ">>"))
        try:
            return await self._call(call) if argv else 0
        finally:
            for path, buffer, append in files:
                if path != "/dev/null":
                    (self.process.guest.files.append if append else self.process.guest.files.write)(path, bytes(buffer))

    async def _call(self, call: Call) -> int:
        name = call.argv[0].rsplit("/", 1)[-1]
        if name == "exit":
            raise _Exit(int(call.argv[1]) if len(call.argv) > 1 else int(self.memory["status"]))
        if name == "cd":
            path = call.path(call.argv[1] if len(call.argv) > 1 else "/root")
            self.process.guest.files.list_dir(path)
            self.memory["cwd"] = path
            return 0
        if name == "export":
            for item in call.argv[1:]:
                key, _, value = item.partition("=")
                self.vars[key] = value or self.vars.get(key, "")
            return 0
        if name == "exec" and len(call.argv) > 1:
            call.argv = call.argv[1:]
            raise _Exit(await self._call(call))
        builtin = self.builtins.get(name)
        if builtin is None:
            await call.write(f"sh: {call.argv[0]}: not found\n", fd=2)
            return 127
        return await builtin(call)

    async def _expand(self, word: Word, *, split: bool) -> list[str]:
        out = ""
        for text, literal in word.pieces:
            out += text if literal else await self._substitute(text)
        plain = len(word.pieces) == 1 and not word.pieces[0][1]
        return out.split() if split and plain and "$" in word.pieces[0][0] else [out]

    async def _substitute(self, text: str) -> str:
        out = ""
        while "$(" in text:
            start = text.index("$(")
            depth, end = 0, start + 1
            for end in range(start + 1, len(text)):
                depth += (text[end] == "(") - (text[end] == ")")
                if depth == 0:
                    break
            inner = bytearray()
            await self._script(parse(text[start + 2 : end]), Io(out=inner))
            out += self._variables(text[:start]) + inner.decode(errors="replace").rstrip("\n")
            text = text[end + 1 :]
        return out + self._variables(text)

    def _variables(self, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1].strip("{}")
            if name == "?":
                return str(self.memory["status"])
            return str(self.process.job.pid) if name == "$" else self.vars.get(name, "")

        return _EXPANSION.sub(value, text)
