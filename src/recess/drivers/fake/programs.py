"""The programs that every fake guest has: a small shell, the usual one-liners, and a web server.

Each keeps what must outlive a snapshot in the process's memory. They know nothing of the host.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

from recess.drivers.fake.guest import Process, Program
from recess.drivers.fake.interpreter import Builtin, Call, Interpreter
from recess.drivers.fake.streams import MemoryStream
from recess.errors import BadInput, NotFound
from recess.units import parse_duration


async def _echo(call: Call) -> int:
    words = call.argv[1:]
    newline = not (words and words[0] == "-n")
    await call.write(" ".join(words if newline else words[1:]) + ("\n" if newline else ""))
    return 0


async def _printf(call: Call) -> int:
    text = call.argv[1].encode().decode("unicode_escape") if len(call.argv) > 1 else ""
    for value in call.argv[2:]:
        text = text.replace("%s", value, 1).replace("%d", value, 1)
    await call.write(text)
    return 0


async def _cat(call: Call) -> int:
    names = call.argv[1:] or ["-"]
    for name in names:
        if name == "-":
            if call.io.stdin is not None:
                await call.write(call.io.stdin)
            else:
                while chunk := await call.process.read():
                    await call.write(chunk)
        else:
            await call.write(_read(call, name))
    return 0


def _read(call: Call, name: str) -> bytes:
    guest = call.process.guest
    path = call.path(name)
    if path == "/proc/sys/kernel/random/boot_id":
        return guest.memory.boot_id.encode() + b"\n"
    if path == "/proc/uptime":
        return f"{guest.uptime_s():.2f} 0.00\n".encode()
    if path == "/proc/sys/kernel/random/uuid":
        return guest.random(16).hex().encode() + b"\n"
    return guest.files.read(path)


async def _head(call: Call) -> int:
    args = call.argv[1:]
    if len(args) >= 2 and args[0] in ("-c", "-n"):
        count, names = int(args[1]), args[2:]
    else:
        count, names = 10, args
    if names and call.path(names[0]) in ("/dev/urandom", "/dev/random"):
        data = call.process.guest.random(count)
    else:
        data = _read(call, names[0]) if names else await call.read_all()
    if args and args[0] == "-c":
        await call.write(data[:count])
    else:
        await call.write(b"".join(data.splitlines(keepends=True)[:count]))
    return 0


async def _od(call: Call) -> int:
    data = _read(call, call.argv[-1]) if call.argv[-1].startswith("/") else await call.read_all()
    await call.write(data.hex() + "\n")
    return 0


async def _base64(call: Call) -> int:
    await call.write(base64.b64encode(await call.read_all()) + b"\n")
    return 0


async def _sha256sum(call: Call) -> int:
    for name in call.argv[1:] or ["-"]:
        data = await call.read_all() if name == "-" else _read(call, name)
        await call.write(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    return 0


async def _wc(call: Call) -> int:
    names = [a for a in call.argv[1:] if not a.startswith("-")]
    data = _read(call, names[0]) if names else await call.read_all()
    count = len(data) if "-c" in call.argv else data.count(b"\n")
    await call.write(f"{count}\n")
    return 0


async def _ls(call: Call) -> int:
    path = call.path(next((a for a in call.argv[1:] if not a.startswith("-")), "."))
    for entry in call.process.guest.files.list_dir(path):
        await call.write(entry.path.rsplit("/", 1)[-1] + "\n")
    return 0


async def _mkdir(call: Call) -> int:
    for name in call.argv[1:]:
        if not name.startswith("-"):
            call.process.guest.files.make_dirs(call.path(name))
    return 0


async def _touch(call: Call) -> int:
    for name in call.argv[1:]:
        call.process.guest.files.append(call.path(name), b"")
    return 0


async def _rm(call: Call) -> int:
    recursive = any(a.startswith("-") and "r" in a for a in call.argv[1:])
    for name in call.argv[1:]:
        if not name.startswith("-"):
            call.process.guest.files.remove(call.path(name), recursive=recursive)
    return 0


async def _test(call: Call) -> int:
    args = [a for a in call.argv[1:] if a != "]"]
    negate = bool(args) and args[0] == "!"
    args = args[1:] if negate else args
    if len(args) == 2 and args[0] in ("-e", "-f", "-d"):
        node = call.process.guest.files.get(call.path(args[1]))
        kinds = {"-e": ("file", "dir", "symlink"), "-f": ("file",), "-d": ("dir",)}[args[0]]
        result = node is not None and node.kind in kinds
    elif len(args) == 2 and args[0] in ("-n", "-z"):
        result = bool(args[1]) == (args[0] == "-n")
    elif len(args) == 3 and args[1] in ("=", "!=", "-eq", "-ne", "-lt", "-gt", "-le", "-ge"):
        result = _compare(args[0], args[1], args[2])
    else:
        result = bool(args and args[0])
    return 0 if result != negate else 1


def _compare(left: str, operator: str, right: str) -> bool:
    if operator in ("=", "!="):
        return (left == right) == (operator == "=")
    one, two = int(left), int(right)
    return {"-eq": one == two, "-ne": one != two, "-lt": one < two, "-gt": one > two,
            "-le": one <= two, "-ge": one >= two}[operator]  # fmt: skip


async def _sleep(call: Call) -> int:
    try:
        seconds = sum(parse_duration(a) for a in call.argv[1:]) if call.argv[1:] else 0.0
    except BadInput:
        await call.write(f"sleep: invalid time interval {call.argv[1:]}\n", fd=2)
        return 1
    if call.argv[1:] == ["infinity"]:
        seconds = 1e9
    memory = call.process.memory
    until = memory.get("sleep_until") or call.process.guest.uptime_s() + seconds
    memory["sleep_until"] = until
    await call.process.sleep_until(until)
    memory["sleep_until"] = 0.0
    return 0


async def _hostname(call: Call) -> int:
    await call.write(call.process.guest.memory.hostname + "\n")
    return 0


async def _env(call: Call) -> int:
    for key, value in sorted(call.env.items()):
        await call.write(f"{key}={value}\n")
    return 0


async def _pwd(call: Call) -> int:
    await call.write(call.cwd + "\n")
    return 0


async def _id(call: Call) -> int:
    user = call.process.job.user
    await call.write(("0\n" if user == "root" else "1000\n") if "-u" in call.argv else f"{user}\n")
    return 0


async def _date(call: Call) -> int:
    wall = call.process.guest.wall_s()
    await call.write(f"{int(wall)}\n" if "+%s" in call.argv else f"{wall:.9f}\n")
    return 0


async def _kill(call: Call) -> int:
    args = call.argv[1:]
    number = 15
    if args and args[0].startswith("-"):
        name = args.pop(0)[1:].removeprefix("SIG")
        number = int(name) if name.isdigit() else {"TERM": 15, "KILL": 9, "INT": 2, "HUP": 1}.get(name, 15)
    for pid in args:
        job = next((j for j in call.process.guest.memory.jobs.values() if str(j.pid) == pid), None)
        if job is None:
            raise NotFound(f"no such process: {pid}", kind="process", ref=pid)
        call.process.guest.signal(job.job_id, number)
    return 0


async def _true(call: Call) -> int:
    del call
    return 0


async def _false(call: Call) -> int:
    del call
    return 1


async def _knock(call: Call) -> int:
    """Send a word to the host through the socket at a path and print the answer: `knock PATH WORD`."""
    path = call.path(call.argv[1])
    if call.process.guest.files.get(path) is None:
        await call.write(f"knock: {path}: no such socket\n", fd=2)
        return 1
    stream = await call.process.connect_out("socket", {"path": path, "pid": call.process.job.pid, "uid": 0})
    await stream.write(call.argv[2].encode() + b"\n")
    await stream.close_write()
    while data := await stream.read():
        await call.write(data.decode(errors="replace"))
    return 0


async def _httpd(call: Call) -> int:
    """Serve the current folder over HTTP/1.0: `httpd PORT|PATH`, also as `python3 -m http.server PORT`."""
    path_asked = next((a for a in call.argv[1:] if a.startswith("/")), "")
    port = path_asked or int(next((a for a in reversed(call.argv[1:]) if a.isdigit()), "8000"))
    files, cwd = call.process.guest.files, call.cwd

    async def serve(stream: MemoryStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 65536:
            chunk = await stream.read()
            if not chunk:
                break
            head += chunk
        target = [*head.split(b" ", 2), b"/", b"/"][1].decode(errors="replace").partition("?")[0]
        path = files.clean(target.lstrip("/") or "index.html", cwd)
        node = files.get(path)
        status, body = ("200 OK", node.data) if node is not None and node.kind == "file" else ("404 Not Found", b"")
        await stream.write(f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await stream.close_write()

    call.process.listen(port, serve)
    await call.process.sleep_until(1e12)
    return 0


async def _python(call: Call) -> int:
    if call.argv[1:3] == ["-m", "http.server"]:
        return await _httpd(call)
    if call.argv[1:2] == ["-c"] and call.argv[2].startswith("print(") and call.argv[2].endswith(")"):
        await call.write(call.argv[2][6:-1].strip("'\"") + "\n")
        return 0
    await call.write("python3: the fake driver has no Python; register a program instead\n", fd=2)
    return 1


BUILTINS: Mapping[str, Builtin] = {
    "echo": _echo, "printf": _printf, "cat": _cat, "head": _head, "od": _od, "xxd": _od, "base64": _base64,
    "sha256sum": _sha256sum, "wc": _wc, "ls": _ls, "mkdir": _mkdir, "rm": _rm, "test": _test, "[": _test,
    "sleep": _sleep, "hostname": _hostname, "env": _env, "printenv": _env, "pwd": _pwd, "id": _id, "whoami": _id,
    "date": _date, "kill": _kill, "true": _true, ":": _true, "sync": _true, "wait": _true, "touch": _touch,
    "false": _false, "httpd": _httpd, "knock": _knock, "python3": _python, "python": _python,
}  # fmt: skip


async def _shell(process: Process, argv: list[str]) -> int:
    flag = next((i for i, a in enumerate(argv) if a.startswith("-") and a.endswith("c")), None)
    interpreter = Interpreter(process, BUILTINS, process.memory)
    if flag is not None and flag + 1 < len(argv):
        return await interpreter.run(argv[flag + 1])
    text = process.memory.setdefault("typed", "")
    while chunk := await process.read():  # an interactive shell, line by line
        text += chunk.decode(errors="replace")
        while "\n" in text:
            line, _, text = text.partition("\n")
            process.memory["at"] = 0
            await interpreter.run(line)
        process.memory["typed"] = text
    return int(process.memory.get("status", 0))


def _as_program(builtin: Builtin) -> Program:
    async def program(process: Process, argv: list[str]) -> int:
        return await builtin(Call(process, argv, process.job.env, process.job.cwd))

    return program


def standard_programs() -> dict[str, Program]:
    """Return the programs by name; a test adds its own."""
    programs = {name: _as_program(builtin) for name, builtin in BUILTINS.items()}
    return programs | {"sh": _shell, "bash": _shell, "dash": _shell}
