"""`recess deploy`: store a version of agent code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import click

from recess.cli.common import Invocation, parse_pairs, verb
from recess.errors import BadInput

FILES_MAX = 500
BYTES_MAX = 8 << 20


def _files(source: Path) -> dict[str, str]:
    if source.is_file():
        return {"agent.py": _text(source)}
    if not source.is_dir():
        raise BadInput(f"no such file or folder: {source}")
    if not (source / "agent.py").is_file():
        raise BadInput(f"{source} holds no agent.py")
    paths = [p for p in sorted(source.rglob("*")) if p.is_file() and not _is_left_out(p.relative_to(source))]
    if len(paths) > FILES_MAX or sum(p.stat().st_size for p in paths) > BYTES_MAX:
        raise BadInput(f"{source} is too large for agent code ({FILES_MAX} files, 8 MiB); put data into an image")
    return {str(p.relative_to(source)): _text(p) for p in paths}


def _is_left_out(path: Path) -> bool:
    """Tell whether a file is no source: hidden (.git, .venv) or compiled."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise BadInput(f"{path}: agent code is text; put data into an image") from exc
    except OSError as exc:
        raise BadInput(f"{path}: {exc.strerror}") from exc


def _declared_name(source: str) -> str:
    """Return the name of the function that is decorated with `@agent`, without running the file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as exc:
        raise BadInput(f"agent.py: {exc}") from exc
    for function in (node for node in tree.body if isinstance(node, ast.AsyncFunctionDef)):
        for decorator in function.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(called).rpartition(".")[2] == "agent":
                return function.name
    raise BadInput("agent.py declares no agent", hint="decorate its function with @agent(...), or give it a --name")


@click.command("deploy")
@click.option("--name", default="", help="Name of the agent; default: that of its @agent function.")
@click.option("--image", default="", help="Image of its machine.")
@click.option("--driver", default="", help="What its machine runs on; default: the node's choice.")
@click.option("-m", "--memory", default="", help="Memory of its machine.")
@click.option("--idle", default="", help="Idle time before it is put away, like 30s.")
@click.option(
    "--policy", type=click.Choice(["pin", "turn", "now", "contract"]), help="When sessions take it; default: turn."
)
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Environment of the agent process.")
@click.option("--route", multiple=True, metavar="NAME=URL", help="A base-URL route of the broker (key added there).")
@click.option("--allow", multiple=True, metavar="HOST", help="Let it reach a host.")
@click.argument("source", type=click.Path(path_type=Path))
@verb
def deploy(
    inv: Invocation, source: Path, name: str, env: tuple[str, ...], route: tuple[str, ...], **plain: Any
) -> None:
    """Store SOURCE (agent.py, or a folder that holds it) as the newest version of an agent."""
    # What was not given is left out: the agent's own declaration and the server's defaults fill it in.
    config = {key: value for key, value in plain.items() if value}
    if env:
        config["env"] = parse_pairs(env, "-e")
    if route:
        config["routes"] = parse_pairs(route, "--route")
    files = _files(source)
    body = {"name": name or _declared_name(files["agent.py"]), "files": files, "config": config}
    row = inv.server.call("POST", "/v1/agents", body)
    inv.out.data(row, f"{row['name']}@{row['version']}")
