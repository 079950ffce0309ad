"""A transcript that is handed out without being copied: a list whose first messages are shared until somebody touches them.

A long session's transcript is made anew for every model call, and all but its end is what it was at the call before. Copying
that would make each turn cost the whole past; handing out the kept messages themselves would let whoever changes his list change
what the next call sees. So the list is his, and a kept message in it is copied when it is first reached through the list: by
index, by slice, by a loop. It is a list in every respect, of plain dicts, and it knows nothing of logs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex, overload

from recess_agent.transcript import Message


class Lent(list[Message]):
    """`kept` messages, shared and never changed here, then `own` ones. `copy` makes one that may be changed."""

    def __init__(self, kept: Iterable[Message], own: Iterable[Message], copy: Callable[[Message], Message]) -> None:
        super().__init__(kept)
        self._copy_one = copy
        self._lent = len(self)  # the first so many are shared, but for those in `_taken`
        self._taken: set[int] = set()
        super().extend(own)

    def _take(self, at: int) -> Message:
        """Return the message at a place that is there, as the caller's own."""
        found = super().__getitem__(at)
        if at >= self._lent or at in self._taken:
            return found
        self._taken.add(at)
        mine = self._copy_one(found)
        super().__setitem__(at, mine)
        return mine

    def _take_all(self) -> None:
        """Make every message the caller's own: before places change, and for who wants all."""
        for at in range(self._lent):
            self._take(at)
        self._lent = 0
        self._taken.clear()

    # -- reading -----------------------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, at: SupportsIndex, /) -> Message: ...

    @overload
    def __getitem__(self, at: slice, /) -> list[Message]: ...

    def __getitem__(self, at: SupportsIndex | slice, /) -> Message | list[Message]:
        if isinstance(at, slice):
            return [self._take(place) for place in range(*at.indices(len(self)))]
        place = at.__index__()
        place += len(self) if place < 0 else 0
        if not 0 <= place < len(self):
            raise IndexError("list index out of range")
        return self._take(place)

    def __iter__(self) -> Iterator[Message]:
        # The caller may change the list in his loop, so places are not counted here.
        self._take_all()
        return super().__iter__()

    def __reversed__(self) -> Iterator[Message]:
        # Whoever looks for something near the end takes only what he looks at. A list that grows meanwhile is no matter.
        return (self[place] for place in range(len(self) - 1, -1, -1))

    def copy(self) -> list[Message]:
        """Return a plain list of the caller's own messages."""
        return list(self)

    def __add__(self, other: Any, /) -> Any:
        return list(self) + other

    def __radd__(self, other: Any, /) -> Any:
        return other + list(self)

    def __mul__(self, times: SupportsIndex, /) -> list[Message]:
        return list(self) * times

    __rmul__ = __mul__

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and deep-copied it is a plain list."""
        return list, (list(self),)

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[Any, ...]:
        del protocol
        return self.__reduce__()

    # -- changing (what only adds at the end changes no place) ---------------------------------------------------------

    def __setitem__(self, at: Any, value: Any, /) -> None:
        self._take_all()
        super().__setitem__(at, value)

    def __delitem__(self, at: SupportsIndex | slice, /) -> None:
        self._take_all()
        super().__delitem__(at)

    def __imul__(self, times: SupportsIndex, /) -> Any:
        self._take_all()
        return super().__imul__(times)

    def insert(self, at: SupportsIndex, message: Message, /) -> None:
        """Insert a message before a place."""
        self._take_all()
        super().insert(at, message)

    def pop(self, at: SupportsIndex = -1, /) -> Message:
        """Remove a message and return it."""
        self._take_all()
        return super().pop(at)

    def remove(self, message: Message, /) -> None:
        """Remove the first message that equals this one."""
        self._take_all()
        super().remove(message)

    def reverse(self) -> None:
        """Turn the order round."""
        self._take_all()
        super().reverse()

    def sort(self, **how: Any) -> None:
        """Sort in place."""
        self._take_all()
        super().sort(**how)

    def clear(self) -> None:
        """Remove all."""
        self._lent = 0
        self._taken.clear()
        super().clear()
