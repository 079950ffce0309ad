"""Room `guestlink` (see docs/architecture.md)."""
