"""The context log as the memory of an OpenAI Agents run: `Runner.run(agent, turn.text, session=LogMemory(s))`.

Fulfils that package's `Session` protocol and imports nothing of it. A run that a crash cut is begun anew with its turn: what
the cut attempt had put here is left out, so nothing is said twice.
"""

from __future__ import annotations

from typing import Any

from recess_agent.records import Records
from recess_agent.session import Session

Item = dict[str, Any]


class LogMemory:
    """Items in the log. `name` keeps several memories of one session apart."""

    session_settings: Any = None

    def __init__(self, session: Session, name: str = "main") -> None:
        self.session_id = f"{session.id}/{name}"
        self._records = Records(session, f"items.{name}")

    async def get_items(self, limit: int | None = None) -> list[Item]:
        """Return all items, or the newest `limit`, in order."""
        items = self._items()
        return items if limit is None else items[len(items) - min(limit, len(items)) :]

    async def add_items(self, items: list[Item]) -> None:
        """Append items."""
        if items:
            await self._records.add(add=list(items))

    async def pop_item(self) -> Item | None:
        """Take the newest item away and return it."""
        items = self._items()
        if not items:
            return None
        await self._records.add(pop=1)
        return items[-1]

    async def clear_session(self) -> None:
        """Forget all items; the log keeps them."""
        await self._records.add(clear=True)

    def _items(self) -> list[Item]:
        items: list[Item] = []
        for one in self._records.all(of_cut_attempts=False):
            if one.get("clear"):
                items.clear()
            if one.get("pop") and items:
                items.pop()
            items += one.get("add") or []
        return items
