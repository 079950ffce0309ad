"""`@agent`: the loop of one agent with its settings and hooks. It knows nothing of sockets or of the log."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from recess_agent.tools import Tool, as_tool
from recess_agent.upcasting import Upcaster, Upcasters

AgentLoop = Callable[..., Awaitable[None]]
Hook = Callable[..., Any]
HOOKS = ("suspend", "resume", "fork", "upgrade", "cut_reply")


class Agent:
    """An agent: `loop` is the user's coroutine function, taking one `Session`.

    Hooks are set with `@my_agent.on_resume` and its sisters; each takes one dict and may be async. They must be
    quick: a suspend hook has two seconds, then the machine is frozen anyway.
    """

    def __init__(
        self, loop: AgentLoop, *, image: str, idle: str, tools: Sequence[Tool], settings: dict[str, Any]
    ) -> None:
        self.loop = loop
        self.name = getattr(loop, "__name__", "agent")
        self.image = image
        self.idle = idle
        self.tools = {one.name: one for one in tools}
        self.settings = settings
        self.hooks: dict[str, Hook] = {}
        self.upcasters = Upcasters()
        self.__doc__ = loop.__doc__

    def on_suspend(self, hook: Hook) -> Hook:
        """Run before the machine is frozen, at most two seconds: {}."""
        self.hooks["suspend"] = hook
        return hook

    def on_resume(self, hook: Hook) -> Hook:
        """Run when this very process continues in a thawed machine: {"rung", "why", "stale"}."""
        self.hooks["resume"] = hook
        return hook

    def on_fork(self, hook: Hook) -> Hook:
        """Run when this process finds itself in a fork: {"parent", "session", "at"}."""
        self.hooks["fork"] = hook
        return hook

    def on_upgrade(self, hook: Hook) -> Hook:
        """Run once in the first process of a new version, before its first turn: {"old", "new"}."""
        self.hooks["upgrade"] = hook
        return hook

    def on_cut_reply(self, hook: Hook) -> Hook:
        """Decide what the model sees of a reply that was cut off while it streamed: takes a `CutReply`, returns what one of its
        methods returns, or None to keep it. It has 30 seconds, and is asked again for a reply that it kept, or was deciding
        about, when a crash cuts the turn: so it decides, and does nothing else."""
        self.hooks["cut_reply"] = hook
        return hook

    def upcast(self, kind: str, schema: int) -> Callable[[Upcaster], Upcaster]:
        """Read entries of `kind` ("note", or "x.something") that were written under `schema` as ones of `schema` + 1: the function
        takes the old body and returns the new one, always the same for the same. New entries are written under the newest."""

        def wrap(step: Upcaster) -> Upcaster:
            self.upcasters.add(kind, schema, step)
            return step

        return wrap

    async def run_hook(self, name: str, info: Any) -> Any:
        """Call a hook if it is set and return what it returns; its exceptions are the caller's."""
        hook = self.hooks.get(name)
        if hook is None:
            return None
        result = hook(info)
        return await result if inspect.isawaitable(result) else result


def agent(
    loop: AgentLoop | None = None,
    *,
    image: str = "base",
    idle: str = "30s",
    tools: Sequence[Tool | Callable[..., Any]] = (),
    **settings: Any,
) -> Any:
    """Declare the agent of this file: `@agent(image="base", idle="30s", tools=[...])`.

    `image`, `idle` and the other settings (memory, memory_most, cpus, disk, network, allow, routes,
    upgrade, contract, snapshot, cron, limits, backend) are read from the
    source by `recess deploy` without running it, so write them as literals.
    """

    def wrap(function: AgentLoop) -> Agent:
        found: list[Tool] = [as_tool(one) for one in tools]
        names = [one.name for one in found]
        if len(set(names)) != len(names):
            raise TypeError("two tools have the same name: " + ", ".join(sorted(names)))
        return Agent(function, image=image, idle=idle, tools=found, settings=dict(settings))

    return wrap if loop is None else wrap(loop)
