"""Room `db` (see docs/architecture.md)."""
