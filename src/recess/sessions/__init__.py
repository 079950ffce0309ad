"""Room `sessions` (see docs/architecture.md)."""
