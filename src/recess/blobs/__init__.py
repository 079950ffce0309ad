"""Room `blobs` (see docs/architecture.md)."""
