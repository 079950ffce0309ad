"""The context log as the message history of pydantic-ai:

    history = LogHistory(s)
    result = await agent.run(turn.text, message_history=history.messages())
    await history.add(result.new_messages())

Needs `pydantic_ai`, whose own adapter writes and reads the messages, so that old ones are read as that package reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from recess_agent.records import Records
from recess_agent.session import Session


class LogHistory:
    """Messages in the log. `name` keeps several histories of one session apart."""

    def __init__(self, session: Session, name: str = "main") -> None:
        self._records = Records(session, f"history.{name}")

    def messages(self) -> list[Any]:
        """Return the history; what an attempt that was cut had added to it is left out."""
        from pydantic_ai.messages import ModelMessagesTypeAdapter

        kept = [message for one in self._records.all(of_cut_attempts=False) for message in one["messages"]]
        return list(ModelMessagesTypeAdapter.validate_python(kept))

    async def add(self, messages: Sequence[Any]) -> None:
        """Append messages (`result.new_messages()`)."""
        from pydantic_ai.messages import ModelMessagesTypeAdapter

        if messages:
            await self._records.add(messages=json.loads(ModelMessagesTypeAdapter.dump_json(list(messages))))
