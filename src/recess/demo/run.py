"""Tells the story once: makes the world, plays the acts, writes the report, cleans up whatever happens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from recess.config import Config
from recess.demo.acts import ACTS
from recess.demo.report import Report, Say
from recess.demo.world import open_world, server_tail
from recess.errors import RecessError
from recess.units import format_duration


@dataclass(frozen=True)
class StoryOptions:
    """`json_path`: where the report goes as JSON. `keep`: leave the story's home for a look."""

    json_path: Path | None = None
    keep: bool = False


async def tell_story(config: Config, options: StoryOptions, say: Say) -> Report:
    """Play all acts; return the report, which is written to the JSON file also when the story fails.

    Raises StoryFailed when something did not hold, or the typed error of what could not be done.
    """
    report = Report(say)
    try:
        async with open_world(config, report, keep=options.keep) as world:
            try:
                for act in ACTS:
                    await act(world)
            except (RecessError, TimeoutError, KeyError, ValueError, IndexError):
                tail = server_tail(world.config)
                if tail:
                    report.tell("the server's last lines:\n" + tail)
                raise
    except BaseException as exc:
        report.error = f"{type(exc).__name__}: {exc}"
        raise
    finally:
        if options.json_path is not None:
            options.json_path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    say("")
    for line in report.table():
        say(line)
    checks = sum(len(step.checks) for step in report.steps)
    say(f"\nthe story holds: {len(report.steps)} steps, {checks} checks, {format_duration(report.seconds)}")
    return report
