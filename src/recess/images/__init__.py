"""Room `images` (see docs/architecture.md)."""
