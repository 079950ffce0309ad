"""Room `snapshots` (see docs/architecture.md)."""
