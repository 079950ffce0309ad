"""Temporal's Replayer on synthetic histories: what its client library needs to bring a workflow's state back, without a server.

    python -m benchmarks.session_temporal TURNS REPEATS     (prints one JSON object; run under the peers' Python)

A turn is two activities, as the other sides' loop. The history is made here, event by event, as a server would write it; a real
worker pages it from a server and caches workflows, so this is no figure of Temporal's whole. It must never import Recess.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import History, HistoryEvent
from temporalio.api.sdk.v1 import WorkflowTaskCompletedMetadata
from temporalio.client import WorkflowHistory
from temporalio.converter import DataConverter
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from benchmarks.session_worker import REPLY

ACTIVITY_S = timedelta(seconds=60)


@workflow.defn(name="loop")
class Loop:
    """The loop of the benchmark."""

    @workflow.run
    async def run(self, turns: int) -> None:
        """Ask and charge."""
        for turn in range(1, turns + 1):
            await workflow.execute_activity("model", turn, start_to_close_timeout=ACTIVITY_S)
            await workflow.execute_activity("charge", turn, start_to_close_timeout=ACTIVITY_S)


@workflow.defn(name="loop")
class NewerLoop:
    """The same with one line more, as the other sides' newer code."""

    @workflow.run
    async def run(self, turns: int) -> None:
        """Do one more thing in each turn."""
        for turn in range(1, turns + 1):
            await workflow.execute_activity("newer", turn, start_to_close_timeout=ACTIVITY_S)
            await workflow.execute_activity("model", turn, start_to_close_timeout=ACTIVITY_S)
            await workflow.execute_activity("charge", turn, start_to_close_timeout=ACTIVITY_S)


class Written:
    """A history being written."""

    def __init__(self) -> None:
        self.events: list[HistoryEvent] = []

    def add(self, kind: str, **attributes: Any) -> int:
        """Add an event; return its number."""
        event = HistoryEvent(event_id=len(self.events) + 1, event_type=EventType.Value(f"EVENT_TYPE_{kind.upper()}"))
        event.event_time.FromSeconds(1_700_000_000 + len(self.events))
        part = getattr(event, f"{kind}_event_attributes")
        part.SetInParent()
        for name, value in attributes.items():
            if isinstance(value, str | int):
                setattr(part, name, value)
            else:
                getattr(part, name).CopyFrom(value)
        self.events.append(event)
        return event.event_id

    def task(self) -> int:
        """Add a workflow task that was completed; return its number."""
        scheduled = self.add("workflow_task_scheduled")
        started = self.add("workflow_task_started", scheduled_event_id=scheduled)
        flags = WorkflowTaskCompletedMetadata(core_used_flags=[1])  # as servers record: types and ids are compared
        return self.add(
            "workflow_task_completed", scheduled_event_id=scheduled, started_event_id=started, sdk_metadata=flags
        )


async def history(turns: int) -> WorkflowHistory:
    """Return the history of a workflow that is behind so many turns of many more."""
    converter = DataConverter.default
    from temporalio.api.common.v1 import ActivityType, Payloads, WorkflowType
    from temporalio.api.taskqueue.v1 import TaskQueue

    async def payloads(value: Any) -> Payloads:
        return Payloads(payloads=await converter.encode([value]))

    result, out = await payloads(REPLY), Written()
    out.add("workflow_execution_started", workflow_type=WorkflowType(name="loop"), task_queue=TaskQueue(name="q"),
            input=await payloads(10**6), original_execution_run_id="run")  # fmt: skip
    done = out.task()
    for turn in range(1, turns + 1):
        for name in ("model", "charge"):
            number = str(2 * turn - (name == "model"))
            scheduled = out.add(
                "activity_task_scheduled", activity_id=number, activity_type=ActivityType(name=name),
                task_queue=TaskQueue(name="q"), input=await payloads(turn), workflow_task_completed_event_id=done,
            )  # fmt: skip
            started = out.add("activity_task_started", scheduled_event_id=scheduled, attempt=1)
            out.add("activity_task_completed", scheduled_event_id=scheduled, started_event_id=started, result=result)
            done = out.task()
    return WorkflowHistory("wf", out.events)


async def replay(kept: WorkflowHistory, loop: type) -> tuple[float, str]:
    """Return how long the replay took, and what was wrong with it."""
    replayer = Replayer(workflows=[loop], workflow_runner=UnsandboxedWorkflowRunner())
    began = time.perf_counter()
    found = await replayer.replay_workflow(kept, raise_on_replay_failure=False)
    return time.perf_counter() - began, repr(found.replay_failure) if found.replay_failure else ""


async def measure(turns: int, repeats: int) -> dict[str, Any]:
    """Return seconds, events, bytes, and whether newer code takes the history."""
    kept = await history(turns)
    took = [await replay(kept, Loop) for _ in range(repeats)]
    if any(wrong for _, wrong in took):
        raise RuntimeError(f"the history is not one of this loop: {took[0][1][:300]}")
    _, wrong = await replay(await history(3), NewerLoop)
    size = History(events=kept.events).ByteSize()
    return {"replay": [s for s, _ in took], "events": len(kept.events), "bytes": size, "deploy": wrong[:200]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1]), int(sys.argv[2])))))
