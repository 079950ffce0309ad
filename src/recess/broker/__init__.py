"""Room `broker` (see docs/architecture.md)."""
