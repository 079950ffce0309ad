"""Room `sdk` (see docs/architecture.md)."""
