"""Recess: durable sessions for AI agents, made of a context log and a machine that freezes whole.

The rooms and what each may know of the others are drawn in `docs/architecture.md` and enforced by import-linter.
"""

__version__ = "0.1.0"
