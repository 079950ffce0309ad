"""The HTTP API: nouns, problem+json, idempotency keys, SSE. It translates; every decision is made below it.

Knows the node's services; must never know a driver, a database or a file format.
"""
