"""In-guest SDK of Recess: standard library only, knows nothing of the host package."""
