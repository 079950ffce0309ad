"""Room `machines` (see docs/architecture.md)."""
