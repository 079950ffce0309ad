"""The context log as LangGraph's saver: `graph.compile(checkpointer=LogSaver(s))`, then `await graph.ainvoke(...)`.

Thin: state is that package's own in-memory saver, which the machine keeps through a freeze; what is put into it is put into
the log first, and read back from there when a new process begins. Needs `langgraph`. Use the `a...` methods: a
sync one works from a thread while the loop runs; where the loop waits for it, it raises RuntimeError.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Sequence
from typing import Any

from langgraph.checkpoint.memory import InMemorySaver

from recess_agent.records import Records
from recess_agent.session import Session


class LogSaver(InMemorySaver):
    """A saver over the log. `name` keeps several of one session apart. `loop_answers_s`: how long a sync call
    gives the event loop to show that it is not blocked."""

    loop_answers_s = 10.0

    def __init__(self, session: Session, name: str = "main") -> None:
        super().__init__()
        self._records = Records(session, f"graph.{name}")
        self._loop = asyncio.get_running_loop()
        for one in self._records.all():
            self._replay(one)

    def _replay(self, one: dict[str, Any]) -> None:
        args = [self._read(arg) for arg in one["args"]]
        if one["op"] == "put":
            super().put(*args)
        elif one["op"] == "put_writes":
            super().put_writes(*args)
        elif one["op"] == "delete_thread":
            super().delete_thread(*args)

    async def aput(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        """Store a state, in the log first."""
        await self._note("put", _plain(config), checkpoint, metadata, new_versions)
        return super().put(config, checkpoint, metadata, new_versions)

    async def aput_writes(self, config: Any, writes: Sequence[Any], task_id: str, task_path: str = "") -> None:
        """Store what a task wrote, in the log first."""
        await self._note("put_writes", _plain(config), list(writes), task_id, task_path)
        super().put_writes(config, writes, task_id, task_path)

    async def adelete_thread(self, thread_id: str) -> None:
        """Forget a thread; the log keeps it."""
        await self._note("delete_thread", thread_id)
        super().delete_thread(thread_id)

    def put(self, config: Any, checkpoint: Any, metadata: Any, new_versions: Any) -> Any:
        """See `aput`."""
        return self._wait(self.aput(config, checkpoint, metadata, new_versions))

    def put_writes(self, config: Any, writes: Sequence[Any], task_id: str, task_path: str = "") -> None:
        """See `aput_writes`."""
        self._wait(self.aput_writes(config, writes, task_id, task_path))

    def delete_thread(self, thread_id: str) -> None:
        """See `adelete_thread`."""
        self._wait(self.adelete_thread(thread_id))

    def _wait(self, work: Any) -> Any:
        """Run `work` in the session's loop from another thread. A graph that is invoked synchronously *in* the loop calls us
        from a thread, too, and holds the loop up meanwhile: that is noticed by the loop's silence."""
        awake = threading.Event()
        self._loop.call_soon_threadsafe(awake.set)
        try:
            inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            inside = False
        if inside or not awake.wait(self.loop_answers_s):
            work.close()
            raise RuntimeError("the event loop waits for this very call: use ainvoke, astream, aput")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _note(self, op: str, *args: Any) -> None:
        await self._records.add(op=op, args=[self._written(arg) for arg in args])

    def _written(self, value: Any) -> list[str]:
        kind, data = self.serde.dumps_typed(value)
        return [kind, base64.b64encode(data).decode()]

    def _read(self, written: list[str]) -> Any:
        return self.serde.loads_typed((written[0], base64.b64decode(written[1])))


def _plain(config: Any) -> dict[str, Any]:
    """Return what a saver needs of a config: the rest (callbacks, run managers) is of this process."""
    wanted = ("thread_id", "checkpoint_ns", "checkpoint_id")
    found = config["configurable"]
    return {"configurable": {name: found[name] for name in wanted if found.get(name) is not None}}
