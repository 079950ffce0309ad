"""Room `drivers` (see docs/architecture.md)."""
