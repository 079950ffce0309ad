"""Our shape of E2B's SDK beside theirs: every name that we have takes what theirs takes, in the same places."""

import inspect

import e2b
import e2b_code_interpreter
import pytest
from e2b.sandbox_sync.commands.command import Commands as TheirCommands
from e2b.sandbox_sync.commands.command_handle import CommandHandle as TheirHandle
from e2b.sandbox_sync.filesystem.filesystem import Filesystem as TheirFiles
from e2b.sandbox_sync.filesystem.watch_handle import WatchHandle as TheirWatch

from recess.adapters import e2b as ours
from recess.adapters import e2b_types
from recess.adapters.e2b_code import Execution, Result
from recess.adapters.e2b_commands import CommandHandle, Commands
from recess.adapters.e2b_files import Filesystem, WatchHandle

# What differs on purpose is in docs/adapters.md: parameters of theirs that nothing here corresponds to.
LEFT_OUT = {
    "gzip", "stream_idle_timeout", "use_octet_stream", "metadata", "include_entry", "allow_network_mounts", "retain_output",
    "mcp", "network", "iam", "lifecycle", "volume_mounts", "logger", "idempotency_key", "next_token", "order", "opts", "query",
    "request_timeout", "keep_memory", "mode", "strict", "on_resume",
}  # fmt: skip
PAIRS = [
    (Commands, TheirCommands, ["run", "list", "connect", "kill", "send_stdin", "close_stdin"]),
    (CommandHandle, TheirHandle, ["wait", "kill", "send_stdin", "close_stdin", "disconnect"]),
    (Filesystem, TheirFiles, ["read", "write", "write_files", "list", "exists", "get_info", "remove", "rename", "make_dir", "watch_dir"]),
    (WatchHandle, TheirWatch, ["get_new_events", "stop"]),
    (ours.Sandbox, e2b.Sandbox, ["create", "fork", "get_host", "is_running", "list"]),
    (ours.Sandbox, e2b_code_interpreter.Sandbox, ["run_code", "create_code_context"]),
]  # fmt: skip


def names(function):
    return [one for one in inspect.signature(function).parameters if one != "self"]


@pytest.mark.parametrize(("mine", "theirs", "method"), [(m, t, name) for m, t, methods in PAIRS for name in methods])
def test_a_call_that_fits_theirs_fits_ours(mine, theirs, method):
    wanted = [one for one in names(getattr(theirs, method)) if one not in LEFT_OUT]
    have = [one for one in names(getattr(mine, method)) if one not in {*LEFT_OUT, "ports", "client"}]
    assert have == wanted


@pytest.mark.parametrize(
    "method", ["connect", "kill", "pause", "get_info", "set_timeout", "create_snapshot", "beta_pause"]
)
def test_sandbox_methods_by_instance_and_by_id(method):
    assert callable(getattr(ours.Sandbox, method))
    assert hasattr(e2b.Sandbox, method)


@pytest.mark.parametrize("name", [one for one in ours.__all__ if hasattr(e2b, one) and one.endswith("Exception")])
def test_errors_have_their_family(name):
    def family(module, kind):
        return {
            one.__name__ for one in getattr(module, kind).__mro__ if one.__module__.split(".")[0] in ("recess", "e2b")
        }

    assert family(ours, name) == family(e2b, name)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (e2b_types.CommandResult, e2b.CommandResult), (e2b_types.EntryInfo, e2b.EntryInfo),
        (e2b_types.FilesystemEvent, e2b.FilesystemEvent), (e2b_types.ProcessInfo, e2b.ProcessInfo),
        (Result, e2b_code_interpreter.Result), (Execution, e2b_code_interpreter.Execution),
    ],
)  # fmt: skip
def test_data_has_fields_of_theirs_and_no_others(mine, theirs):
    have = set(mine.__dataclass_fields__)
    there = {name for cls in theirs.__mro__ for name in getattr(cls, "__annotations__", {})}
    assert have <= there
