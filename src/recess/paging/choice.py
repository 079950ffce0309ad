"""How a machine's memory is brought back: a pure decision over what is known, told in words.

remap    its pages lie on this node uncompressed and are mapped in place: nothing is read, copied or waited for
inject   every page is read and put there before the machine runs: the simplest, and the quickest for little memory
lazy     pages are put there when they are touched, and the rest right behind: needs a userfaultfd that also catches the
         kernel's own faults, and a pager
"""

from __future__ import annotations

from dataclasses import dataclass

from recess.units import MIB, PAGE_BYTES

REMAP, INJECT, LAZY = "remap", "inject", "lazy"
LAZY_BYTES_MIN = 48 * MIB
"""Below this, reading everything first costs less than a pager (measured: 0.6 ms per MiB against some 30 ms)."""


@dataclass(frozen=True)
class Facts:
    """What the decision is made of. `pages`: of the memory, that differ from the template."""

    pages: int
    over_template: bool  # its memory is a private mapping of a template's file
    driver_can: bool  # the driver has lazy memory at all
    pager_there: bool  # this node can run pagers
    wanted: str = "auto"  # auto | remap | inject | lazy: the user's word (remap: as auto, but never lazily)
    driver_maps: bool = False  # the driver can map pages in place
    at_hand: bool = False  # a file of this node has them uncompressed
    many: bool = False  # all of the pages are needed at once, by several machines or to be looked at


@dataclass(frozen=True)
class Choice:
    """`way` is remap, inject or lazy; `why` says it in one line."""

    way: str
    why: str


def choose(facts: Facts) -> Choice:
    """Decide. The driver may still find that this host refuses, and then injects: that is told, too."""
    size = f"{facts.pages * PAGE_BYTES // MIB} MiB to bring back"
    if facts.wanted == INJECT:
        return Choice(INJECT, "the configuration wants it")
    if facts.wanted != LAZY and facts.driver_maps and facts.over_template and facts.at_hand:
        return Choice(REMAP, f"{size}, which this node keeps uncompressed")
    if facts.wanted == REMAP:
        return Choice(INJECT, "this node does not keep it uncompressed, and the configuration wants nothing lazily")
    if not facts.driver_can:
        return Choice(INJECT, "this driver has no lazy memory")
    if facts.many:
        return Choice(INJECT, "it is for more than one machine")
    if not facts.pager_there:
        return Choice(INJECT, "this node has no pager")
    if not facts.over_template:
        return Choice(INJECT, "its memory stands on no template")
    if facts.wanted == LAZY:
        return Choice(LAZY, "the configuration wants it")
    if facts.pages * PAGE_BYTES < LAZY_BYTES_MIN:
        return Choice(INJECT, f"only {size}")
    return Choice(LAZY, size)
