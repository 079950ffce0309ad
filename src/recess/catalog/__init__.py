"""Room `catalog` (see docs/architecture.md)."""
