"""Which layers are compressed once more, when, and how hard: the policy and the decision over plain data. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from recess.errors import BadInput
from recess.frames import FRAME_RAW_BYTES_MAX, LEVEL_MAX, LEVEL_MIN
from recess.units import KIB


@dataclass(frozen=True)
class Recompression:
    """The policy. `after_s`: how long every snapshot that uses a layer must have slept, 0: never recompress; `level`:
    zstd's; `frame_bytes`: content of a frame, which is what one page fault must decode; `budget_s`: a round begins no
    layer after that."""

    after_s: float = 0.0
    level: int = 19
    frame_bytes: int = 256 * KIB
    budget_s: float = 300.0

    def __post_init__(self) -> None:
        if not LEVEL_MIN <= self.level <= LEVEL_MAX:
            raise BadInput(f"recompress_level must be {LEVEL_MIN} to {LEVEL_MAX}, not {self.level}")
        if not 0 < self.frame_bytes <= FRAME_RAW_BYTES_MAX:
            raise BadInput(f"recompress_frame_bytes must be 1 to {FRAME_RAW_BYTES_MAX}, not {self.frame_bytes}")


@dataclass(frozen=True)
class StoredLayer:
    """One layer as a round sees it. `used`: when the youngest snapshot that names it was put or renewed (wall seconds);
    `written_bytes`: of the form as written, 0 if it is gone."""

    id: str
    used: float
    written_bytes: int


def due(layers: Iterable[StoredLayer], policy: Recompression, *, now: float) -> list[StoredLayer]:
    """Return the layers to recompress, the largest first: it gives back most for the budget. Pure."""
    if not policy.after_s:
        return []
    asleep = [layer for layer in layers if layer.written_bytes and layer.used < now - policy.after_s]
    return sorted(asleep, key=lambda layer: (-layer.written_bytes, layer.id))
