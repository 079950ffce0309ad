"""Much is made at once when an agent takes in a long past: objects by the million, none of which is garbage. Python would look
through all of them again and again meanwhile, which takes longer than making them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Do without the cyclic collector in this block; left as it was found."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
