"""What a request handler gets: the node and the progress hub, from the application's state."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from recess.api.idempotency import KeyedResults
from recess.api.wire import ProgressHub
from recess.node.local import LocalNode


@dataclass
class Context:
    """The services behind one application. `stop` is set to end the server."""

    node: LocalNode
    hub: ProgressHub
    keys: KeyedResults = field(default_factory=KeyedResults)


def context_of(request: HTTPConnection) -> Context:
    """Return the application's context."""
    context = request.app.state.context
    assert isinstance(context, Context)  # noqa: S101 - set once when the application is made
    return context
