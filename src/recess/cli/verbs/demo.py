"""`recess demo`: the story of the whole system, played for real and checked."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import click

from recess.cli.output import Output
from recess.config import load_config
from recess.errors import RecessError

SEEN_CHARS = 2000


@click.command("demo")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the report there.")
@click.option("--keep", is_flag=True, help="Leave the story's home in place.")
def demo(json_path: Path | None, keep: bool) -> int:
    """Play the story: build, lunch, message, fork, crash, upgrade; every step is checked."""
    # Imported here: the story's servers cost what no other verb should pay.
    from recess.demo import StoryOptions, tell_story

    # The story's providers are servers: a client that is killed (it is part of the story) must be an error of one
    # write, not the end of this process.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    out = Output(command="demo")
    try:
        asyncio.run(tell_story(load_config(), StoryOptions(json_path=json_path, keep=keep), out.line))
    except (RecessError, TimeoutError, KeyError, ValueError, IndexError) as exc:
        # A story that breaks is a failure of ours whatever broke it: said loudly, for people, with a non-zero exit.
        error = exc if isinstance(exc, RecessError) else RecessError(f"the story broke: {type(exc).__name__}: {exc}")
        out.error(error, 1)
        for name, value in error.details.items():
            out.progress(f"  {name}: {str(value)[-SEEN_CHARS:]}")
        return 1
    return 0
