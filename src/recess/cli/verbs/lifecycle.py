"""`recess start stop restart kill rm wait rename pause unpause suspend resume`: verbs that take machines and move them between states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import click

from recess.cli.common import Invocation, verb
from recess.cli.terminal import follow_main
from recess.errors import BadInput, RecessError
from recess.sdk.transport import Json
from recess.units import format_bytes, format_duration


def each(inv: Invocation, refs: tuple[str, ...], act: Callable[[str], Any]) -> int:
    """Do it to each; go on after an error, as Docker does, and fail at the end.

    With --json a failure's envelope is the first error's, and its `details.results` tell what became of each.
    """
    done: list[Any] = []
    failed: RecessError | None = None
    for ref in refs:
        try:
            result = act(ref)
        except RecessError as error:
            failed = failed or error
            done.append({"ref": ref, "error": error.to_dict()})
            if not inv.out.as_json:
                inv.out.error(error, error.exit_code)
            continue
        done.append({"ref": ref, "result": result})
        inv.out.line(ref)
    if failed is None:
        inv.out.data(done)
        return 0
    if inv.out.as_json:
        whole = copy.copy(failed)
        whole.details = {**failed.details, "results": done}
        inv.out.error(whole, whole.exit_code)
    return failed.exit_code


@click.command("start")
@click.option("-a", "--attach", is_flag=True, help="Attach to its main process (one machine).")
@click.option("-i", "--interactive", is_flag=True, help="Attach stdin too.")
@click.option("--detach-keys", default="", metavar="KEYS", help="Keys that detach, like ctrl-p,ctrl-q.")
@click.argument("machines", nargs=-1, required=True)
@verb
def start(inv: Invocation, machines: tuple[str, ...], attach: bool, interactive: bool, detach_keys: str) -> int:
    """Start MACHINES: those that were created, and those that have ended, which boot again from their disks."""

    def act(ref: str) -> Any:
        answer = inv.act("POST", f"/v1/machines/{ref}/start", {})
        _tell_rung(inv, ref, answer["resume"])
        return answer

    if not (attach or interactive):
        return each(inv, machines, act)
    if len(machines) != 1:
        raise BadInput("-a and -i take one machine")
    row = act(machines[0])["machine"]
    return follow_main(inv, row, stdin=interactive and row["spec"]["stdin"], keys=detach_keys) or 0


def _tell_rung(inv: Invocation, ref: str, report: Json | None) -> None:
    if report is not None:
        inv.out.progress(f"{ref}: rung {report['rung']} ({report['why']}) in {format_duration(report['seconds'])}")


@click.command("restart")
@click.option("-t", "--time", "--timeout", "timeout_s", default=10.0, help="Seconds between SIGTERM and the end.")
@click.argument("machines", nargs=-1, required=True)
@verb
def restart(inv: Invocation, machines: tuple[str, ...], timeout_s: float) -> int:
    """Stop MACHINES and start them again from their disks."""

    def act(ref: str) -> Any:
        inv.server.call("POST", f"/v1/machines/{ref}/stop", {"timeout_s": timeout_s})
        answer = inv.act("POST", f"/v1/machines/{ref}/start", {})
        _tell_rung(inv, ref, answer["resume"])
        return answer

    return each(inv, machines, act)


@click.command("stop")
@click.option("-t", "--time", "--timeout", "timeout_s", default=10.0, help="Seconds between SIGTERM and the end.")
@click.argument("machines", nargs=-1, required=True)
@verb
def stop(inv: Invocation, machines: tuple[str, ...], timeout_s: float) -> int:
    """Stop MACHINES: SIGTERM to the main process, then the end."""
    return each(inv, machines, lambda m: inv.server.call("POST", f"/v1/machines/{m}/stop", {"timeout_s": timeout_s}))


@click.command("kill")
@click.option("-s", "--signal", "signal", default="KILL", help="Another one goes to the main process.")
@click.argument("machines", nargs=-1, required=True)
@verb
def kill(inv: Invocation, machines: tuple[str, ...], signal: str) -> int:
    """End MACHINES at once, or send their main processes a signal."""
    return each(inv, machines, lambda m: inv.server.call("POST", f"/v1/machines/{m}/kill", {"signal": signal}))


@click.command("wait")
@click.argument("machines", nargs=-1, required=True)
@verb
def wait(inv: Invocation, machines: tuple[str, ...]) -> int:
    """Wait until MACHINES have ended, and print their exit codes."""
    done = []
    for ref in machines:
        code: int | None = None
        while code is None:
            code = inv.server.call("POST", f"/v1/machines/{ref}/wait", {})["exit_code"]
        inv.out.line(str(code))
        done.append({"ref": ref, "exit_code": code})
    inv.out.data(done)
    return 0


@click.command("rename")
@click.argument("machine")
@click.argument("name")
@verb
def rename(inv: Invocation, machine: str, name: str) -> None:
    """Give MACHINE another NAME."""
    inv.out.data(inv.server.call("POST", f"/v1/machines/{machine}/rename", {"name": name}))


@click.command("rm")
@click.option("-f", "--force", is_flag=True, help="Kill those that run.")
@click.option("-v", "--volumes", is_flag=True, help="Docker's; the disk of a machine goes with it anyway.")
@click.argument("machines", nargs=-1, required=True)
@verb
def rm(inv: Invocation, machines: tuple[str, ...], force: bool, volumes: bool) -> int:
    """Remove MACHINES; their snapshots stay."""

    def act(ref: str) -> Any:
        answer = inv.server.call("DELETE", f"/v1/machines/{ref}", query={"force": 1 if force else None})
        if "left" in answer:
            inv.out.progress(f"{ref}: its row was damaged; row and files stay for a week in {answer['left']}")
        return answer

    return each(inv, machines, act)


@click.command("pause")
@click.argument("machines", nargs=-1, required=True)
@verb
def pause(inv: Invocation, machines: tuple[str, ...]) -> int:
    """Stop the CPUs of MACHINES; their memory is held."""
    return each(inv, machines, lambda m: inv.server.call("POST", f"/v1/machines/{m}/pause", {}))


@click.command("unpause")
@click.argument("machines", nargs=-1, required=True)
@verb
def unpause(inv: Invocation, machines: tuple[str, ...]) -> int:
    """Let paused MACHINES run."""
    return each(inv, machines, lambda m: inv.server.call("POST", f"/v1/machines/{m}/unpause", {}))


@click.command("suspend")
@click.argument("machines", nargs=-1, required=True)
@verb
def suspend(inv: Invocation, machines: tuple[str, ...]) -> int:
    """Put MACHINES away: snapshot stored, process gone, memory given back."""

    def act(ref: str) -> Any:
        row = inv.server.call("POST", f"/v1/machines/{ref}/suspend", {})
        inv.out.progress(f"{ref}: stored {format_bytes(int(row['figures'].get('new_bytes', 0)))}")
        return row

    return each(inv, machines, act)


@click.command("resume")
@click.option("--disk", is_flag=True, help="Boot cold from the newest disk: files are kept, memory is not.")
@click.argument("machines", nargs=-1, required=True)
@verb
def resume(inv: Invocation, machines: tuple[str, ...], disk: bool) -> int:
    """Bring back MACHINES that do not run: with their memory if it can be had, else cold from their disk."""

    def act(ref: str) -> Any:
        report = inv.server.call("POST", f"/v1/machines/{ref}/resume", {"disk": True} if disk else {})
        inv.out.progress(f"{ref}: rung {report['rung']} ({report['why']}) in {format_duration(report['seconds'])}")
        return report

    return each(inv, machines, act)
