"""The runner: one agent file, one session, one process. Exit code 0: the loop ended; 1: it raised; 2: bad usage."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from recess_agent.app import Agent
from recess_agent.cancelling import TurnCancelled
from recess_agent.session import Session
from recess_agent.wire import SessionClosed, SessionError


def load(path: str) -> Agent:
    """Import an agent file and return its one Agent. Raises ValueError if it holds none, or more than one, or lacks a step
    of an upcast."""
    file = Path(path).resolve()
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location("recess_user_agent", str(file))
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {path}")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules["recess_user_agent"] = module
    spec.loader.exec_module(module)
    found = {id(value): value for value in vars(module).values() if isinstance(value, Agent)}
    if len(found) != 1:
        raise ValueError(
            f"{path} defines {len(found)} agents; one is needed: decorate one coroutine function with @agent"
        )
    app = next(iter(found.values()))
    app.upcasters.check()
    return app


async def run(path: str) -> int:
    """Run the agent until its loop ends, the session closes or SIGTERM comes."""
    version, job = os.environ.get("RECESS_AGENT_VERSION", ""), os.environ.get("RECESS_AGENT_JOB", "")
    broken = ""
    try:
        app = load(path)
    except Exception:  # told to the host below: a version that cannot even be imported is a failed turn, not a mystery
        broken = traceback.format_exc()
        app = Agent(_nothing, image="", idle="0s", tools=[], settings={})
    session = Session(app, version=version, job=job)
    try:
        await session.start()
        if not broken:
            broken = await _loop(app, session)
        if not broken:
            return 0
        sys.stderr.write(broken)
        sys.stderr.flush()
        await session.crashed(broken)
        return 1
    except (SessionClosed, asyncio.CancelledError):
        return 0
    except SessionError as exc:
        sys.stderr.write(f"recess_agent: {exc}\n")
        return 1
    finally:
        await session.stop()


async def _loop(app: Agent, session: Session) -> str:
    while True:
        try:
            await app.loop(session)
        except TurnCancelled:
            # The loop let it out: it begins anew in this very process, which waits for its next turn.
            session.leave_turn()
            continue
        except SessionClosed:
            return ""
        except Exception:  # the user's code: its traceback goes into the log with the turn's end
            return traceback.format_exc()
        return ""


async def _nothing(session: Session) -> None:
    del session


async def _main(path: str) -> int:
    task = asyncio.ensure_future(run(path))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return 0


def main(argv: list[str]) -> int:
    """Command line."""
    if len(argv) != 2 or argv[0] != "run":
        sys.stderr.write("usage: python3 -m recess_agent run AGENT.py\n")
        return 2
    code = asyncio.run(_main(argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    return code
