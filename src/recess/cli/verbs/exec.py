"""`recess exec` and `recess attach`."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, callers_env, parse_env, verb
from recess.cli.terminal import converse, follow_main, size
from recess.sdk.exec_stream import ExecStream


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the machine.")
@click.option("-i", "--interactive", is_flag=True, help="Keep stdin open.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Environment.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Environment from a file.")
@click.option("-w", "--workdir", default="", help="Working folder; default: the machine's, of another user /.")
@click.option("-u", "--user", default="", help="User, or uid[:gid]; default: the machine's.")
@click.option("--no-wake", is_flag=True, help="Not if the machine sleeps because it was idle.")
@click.argument("machine")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@verb
def exec_(
    inv: Invocation, machine: str, command: tuple[str, ...], detach: bool, interactive: bool, tty: bool,
    env: tuple[str, ...], env_file: tuple[str, ...], workdir: str, user: str, no_wake: bool,
) -> int:  # fmt: skip
    """Run COMMAND in a running MACHINE; its exit code is this command's."""
    rows, cols = size()
    start = {
        "argv": list(command),
        "env": parse_env(env, env_file, callers_env()),
        "cwd": workdir or None,
        "user": user or None,
        "tty": tty,
        "stdin": interactive,
        "rows": rows,
        "cols": cols,
        "detach": detach,
        "wake": not no_wake,
    }
    stream = ExecStream(inv.server, machine, start)
    if detach:
        stream.close()
        inv.out.data({"job_id": stream.job_id, "pid": stream.pid}, stream.job_id)
        return 0
    return converse(stream, is_tty=tty, stdin=interactive) or 0


@click.command("attach")
@click.option("--no-stdin", is_flag=True, help="Only watch.")
@click.option("--detach-keys", default="", metavar="KEYS", help="Keys that detach, like ctrl-p,ctrl-q.")
@click.option("--sig-proxy/--no-sig-proxy", default=True, help="Hand our signals on to the process.")
@click.argument("machine")
@verb
def attach(inv: Invocation, machine: str, no_stdin: bool, detach_keys: str, sig_proxy: bool) -> int:
    """Attach to a MACHINE's main process. Detach with Ctrl-P Ctrl-Q."""
    row = inv.server.call("GET", f"/v1/machines/{machine}")
    code = follow_main(inv, row, stdin=row["spec"]["stdin"] and not no_stdin, keys=detach_keys, proxy=sig_proxy)
    return code or 0
