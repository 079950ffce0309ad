"""One thin file a verb (or a family of verbs): parse flags, one or two calls, print."""
