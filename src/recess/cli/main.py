"""`recess`: global options, lazy verbs, errors to exit codes.

A verb's module is imported only when that verb runs: `recess --help` must stay under 120 ms, so help texts of the
verbs stand in this table.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import click

from recess import __version__
from recess.cli.output import Output
from recess.errors import BadInput, RecessError

# verb -> (module below recess.cli.verbs, attribute, one line of help)
VERBS: dict[str, tuple[str, str, str]] = {
    "run": ("run", "run", "Start a machine from an image and run a command in it"),
    "create": ("run", "create", "Make a machine without starting it"),
    "start": ("lifecycle", "start", "Start machines that were created or have ended"),
    "exec": ("exec", "exec_", "Run a command in a running machine"),
    "attach": ("exec", "attach", "Attach to a machine's main process"),
    "ps": ("ps", "ps", "List machines"),
    "logs": ("logs", "logs", "Show the output of a machine's main process"),
    "inspect": ("inspect", "inspect", "Show everything known about a machine, snapshot, image or session"),
    "top": ("watch", "top", "Show the processes of a machine"),
    "stats": ("watch", "stats", "Show memory and CPU of machines"),
    "port": ("watch", "port", "Show where a machine's ports are published"),
    "events": ("watch", "events", "Show what happens to machines"),
    "wait": ("lifecycle", "wait", "Wait until machines have ended, and print their exit codes"),
    "rename": ("lifecycle", "rename", "Give a machine another name"),
    "stop": ("lifecycle", "stop", "Stop machines"),
    "restart": ("lifecycle", "restart", "Stop machines and start them again"),
    "kill": ("lifecycle", "kill", "End machines at once"),
    "rm": ("lifecycle", "rm", "Remove machines"),
    "pause": ("lifecycle", "pause", "Stop a machine's CPUs, keep its memory"),
    "unpause": ("lifecycle", "unpause", "Let a paused machine run"),
    "suspend": ("lifecycle", "suspend", "Put a machine away: snapshot stored, memory given back"),
    "resume": ("lifecycle", "resume", "Bring a suspended machine back"),
    "cp": ("cp", "cp", "Copy files and folders to or from a machine"),
    "volume": ("volume", "volume", "Named volumes: create, ls, inspect, rm, prune"),
    "sync": ("volume", "sync", "Exchange a machine's volumes with the host now"),
    "export": ("cp", "export", "Write all files of a machine as a tar"),
    "commit": ("cp", "commit", "Make an image of a machine's files"),
    "snapshot": ("snapshot", "snapshot", "Take a snapshot of a machine"),
    "snapshots": ("snapshots", "snapshots", "Manage snapshots: ls, tree, inspect, diff, verify, tag, rm, prune"),
    "restore": ("snapshot", "restore", "Start a machine from a snapshot"),
    "fork": ("snapshot", "fork", "Fork a running machine"),
    "rewind": ("snapshot", "rewind", "Take a machine back to one of its snapshots"),
    "diff": ("snapshot", "diff", "Show what changed from one snapshot to another"),
    "push": ("snapshot_transfer", "push", "Copy a snapshot to a remote store"),
    "images": ("images", "images", "Manage images: ls, create, inspect, rm"),
    "pull": ("images", "pull", "Take an image from a registry"),
    "import": ("images", "import_", "Take an image from a file or folder"),
    "build": ("images", "build", "Build an image from a Dockerfile"),
    "tag": ("images", "tag", "Give an image a further name"),
    "rmi": ("images", "rmi", "Remove images"),
    "egress": ("egress", "egress", "Show and change what a machine may reach, and what it tried"),
    "secrets": ("secrets", "secrets", "Keep values that machines use and never hold: set, ls, rm"),
    "deploy": ("deploy", "deploy", "Store a version of agent code"),
    "session": ("session", "session", "Agent sessions: start, send, cancel, answer, log, ls, suspend, resume, fork, rewind, close"),
    "mcp": ("mcp", "mcp", "Serve machines and sessions to clients of the Model Context Protocol"),
    "demo": ("demo", "demo", "The story, checked: an agent that goes to lunch and comes back"),
    "bench": ("bench", "bench", "Measure: snapshots beside other ways, the codec, the budgets"),
    "doctor": ("doctor", "doctor", "Check this host and run a guest"),
    "context": ("context", "context", "Other homes and servers by name: create, use, ls, show, rm"),
    "db": ("db", "db", "Check, back up, restore or migrate the database"),
    "up": ("up", "up", "Run the server in the foreground"),
    "down": ("up", "down", "Stop the local server; machines keep running unless --all"),
    "df": ("prune", "df", "Show what takes space on this node"),
    "prune": ("prune", "prune", "Remove what nothing needs"),
    "errors": ("errors", "errors", "List every error with its code and exit status"),
    "completion": ("completion", "completion", "Print a shell's completion script"),
    "version": ("version", "version", "Show versions"),
}  # fmt: skip


# Docker's longer words for the same: `docker container ls`, `docker image rm x`, `docker system df`.
_LONGER: dict[tuple[str, str], list[str]] = {
    ("container", "ls"): ["ps"], ("container", "list"): ["ps"], ("container", "ps"): ["ps"],
    ("image", "ls"): ["images", "ls"], ("image", "list"): ["images", "ls"], ("image", "rm"): ["rmi"],
    ("image", "inspect"): ["images", "inspect"], ("image", "pull"): ["pull"], ("image", "build"): ["build"],
    ("image", "tag"): ["tag"], ("image", "import"): ["import"], ("image", "load"): ["load"], ("image", "save"): ["save"],
    ("system", "df"): ["df"], ("system", "events"): ["events"], ("system", "prune"): ["prune"], ("system", "info"): ["info"],
    ("builder", "build"): ["build"], ("buildx", "build"): ["build"],
}  # fmt: skip
_OF_A_CONTAINER = frozenset({
    "run", "create", "start", "stop", "restart", "kill", "rm", "exec", "attach", "logs", "inspect", "top", "stats", "port", "wait",
    "rename", "pause", "unpause", "cp", "export", "commit", "diff",
})  # fmt: skip

# Docker's verbs that are others here, or none: what to type instead.
ELSEWHERE = {
    "login": "docker login, podman login or skopeo login: Recess reads their logins",
    "logout": "docker logout, podman logout or skopeo logout: Recess reads their logins",
    "load": "recess import FILE [NAME] takes what docker save writes",
    "save": "recess export MACHINE writes a machine's files as a tar; recess push SNAPSHOT moves a whole machine",
    "container": "the verbs stand alone: recess ps, recess run, recess rm",
    "image": "recess images ls, inspect, rm; recess pull, build, tag",
    "network": "docs/egress.md: --allow, --net, -p; machines of a project know each other as NAME.recess.internal",
    "system": "recess df, recess prune, recess events, recess doctor",
    "info": "recess doctor, recess version",
    "checkpoint": "recess snapshot, recess restore",
    "update": "size and flags of a machine stay: recess snapshot, then recess run with others",
    "history": "recess images inspect NAME; of snapshots: recess snapshots tree",
}


_KERNEL = "a machine has a kernel of its own, and root in it may do everything there"
_SIZES = "-m, --cpus and --disk say how large a machine is"
_NETWORK = "docs/egress.md: machines of a project know each other as NAME.recess.internal; the broker resolves names"
# Docker's flags of `run` that are others here, or none.
FLAGS_ELSEWHERE = {
    "--hostname": "a machine's name is its hostname: --name", "--read-only": "the image is never written, the disk is the machine's own",
    "--tmpfs": "/run and /dev/shm are in memory, the rest is the machine's own disk", "--publish-all": "-p PORT for each",
    "--cap-add": _KERNEL, "--cap-drop": _KERNEL, "--security-opt": _KERNEL, "--device": _KERNEL, "--pid": _KERNEL, "--ipc": _KERNEL,
    "--shm-size": _SIZES, "--memory-swap": _SIZES, "--ulimit": _SIZES, "--pids-limit": _SIZES, "--cpu-shares": _SIZES,
    "--cpuset-cpus": _SIZES, "--link": _NETWORK, "--network-alias": _NETWORK, "--add-host": _NETWORK, "--dns": _NETWORK,
    "--ip": _NETWORK, "--log-driver": "recess logs keeps the newest output", "--log-opt": "recess logs keeps the newest output",
    "--stop-timeout": "recess stop -t SECONDS", "--gpus": "there are none in a machine", "--platform": "recess images inspect NAME",
}  # fmt: skip


class _Usage(BadInput):
    """The command line itself is wrong: an unknown verb or option, a missing argument."""

    code = "usage"


class LazyGroup(click.Group):
    """A group whose commands are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS:
            return None
        module, attribute, _ = VERBS[cmd_name]
        command = getattr(importlib.import_module(f"recess.cli.verbs.{module}"), attribute)
        assert isinstance(command, click.Command)  # noqa: S101 - the table names commands
        if ctx.resilient_parsing:  # a shell asks what could come next
            importlib.import_module("recess.cli.completing").teach(command, cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Offer verbs and options, from the table: who presses Tab waits."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=text) for name, (_, _, text) in VERBS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs' table without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, _, help_text) in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="recess %(version)s")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON envelope instead of text.")
@click.option("--context", default="", metavar="NAME", help="Another home or server, see `recess context`.")
@click.pass_context
def cli(ctx: click.Context, as_json: bool, context: str) -> None:
    """Durable sessions for AI agents: microVMs that freeze, thaw and fork, and the log beside them."""
    ctx.obj = {"json": as_json, "context": context}


def _wants_json(args: list[str]) -> bool:
    """Tell whether --json stands before the end of our own options (a guest command may hold one too)."""
    for arg in args:
        if arg == "--":
            return False
        if arg == "--json":
            return True
    return False


def _verb_at(args: list[str]) -> int:
    """Return where the verb stands, the first word that is neither an option nor the value of one; the end if there is none."""
    before = ""
    for at, arg in enumerate(args):
        if not arg.startswith("-") and before != "--context":
            return at
        before = arg
    return len(args)


def _command(args: list[str]) -> str:
    """Return the verb, "" if there is none."""
    return "".join(args[_verb_at(args) :][:1])


def shortened(args: list[str]) -> list[str]:
    """Return the command line with Docker's longer words as their short ones; any other as it is. Pure."""
    at = _verb_at(args)
    first, second = [*args[at : at + 2], "", ""][:2]
    if first == "container" and second in _OF_A_CONTAINER:
        return [*args[:at], *args[at + 1 :]]
    short = _LONGER.get((first, second))
    return args if short is None else [*args[:at], *short, *args[at + 2 :]]


def _exit_code(command: str, error: RecessError) -> int:
    """Docker's rules: 126 and 127 for what cannot be started in the guest; `run` answers 125 for failures of our own,
    so that they are not taken for the guest's."""
    if command in ("run", "exec") and error.details.get("exit_code") in (126, 127):
        return int(error.details["exit_code"])
    return 125 if command == "run" and error.exit_code == 1 else error.exit_code


def run_cli(args: list[str]) -> int:
    """Run one invocation and return its exit code."""
    args = shortened(args)
    command = _command(args)
    output = Output(as_json=_wants_json(args), command=command)
    try:
        result: Any = cli.main(args=args, prog_name="recess", standalone_mode=False)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:  # `recess`, `recess session`: shown what there is
        print(exc.format_message())
        return 0
    except click.UsageError as exc:
        of = exc.ctx.command_path if exc.ctx else "recess"
        instead = ELSEWHERE.get(command) if of == "recess" else None
        if isinstance(exc, click.NoSuchOption) and command in ("run", "create"):
            instead = FLAGS_ELSEWHERE.get(exc.option_name)
        error = _Usage(exc.format_message(), hint=instead or f"{of} --help")
        output.error(error, error.exit_code)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except RecessError as exc:
        code = _exit_code(command, exc)
        output.error(exc, code)
        return code
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(run_cli(sys.argv[1:]))


if __name__ == "__main__":
    main()
