"""Room `frames` (see docs/architecture.md)."""
