"""Room `contextlog` (see docs/architecture.md)."""
