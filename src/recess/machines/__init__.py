"""Machines: one VM each, with a name, a state and an identity, made from images, put away and brought back.

`service` is the interface that sessions and the API code against, `contract` the one that drivers fulfil, `manager` the
implementation in between. This room must never know of the context log.
"""
