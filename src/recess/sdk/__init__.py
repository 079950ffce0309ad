"""Clients of the HTTP API. This room knows the HTTP schema and nothing else of the house.

The CLI starts fast because this package needs only the standard library until a terminal is attached.
"""
