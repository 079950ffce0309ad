"""A local payment provider that counts: one charge per idempotency key, however often it is asked.

`POST /charges {"cents": N}` with an `Idempotency-Key`; `GET /charges?key=K` tells whether a charge with this key
exists (what a tool's `verify` asks). `hold()` makes the next charge count and then keep its answer back: the moment
between "the world has changed" and "the caller knows", which is where a crash test strikes.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict, dataclass

from recess.testing.http_server import HttpRequest, HttpResponse, LoopbackServer, json_response


@dataclass(frozen=True)
class Charge:
    """One counted charge."""

    id: str
    cents: int
    key: str


class PaymentServer(LoopbackServer):
    """The provider; `charges` by key, `calls` counts all POSTs, repeated ones too."""

    def __init__(self, api_key: str, *, port: int = 0) -> None:
        super().__init__(port)
        self._api_key = api_key
        self.charges: dict[str, Charge] = {}
        self.calls = 0
        self.counted = asyncio.Event()
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> None:
        """Keep back the answers to charges from now on, until `release`; `counted` is set when one was counted."""
        self.counted.clear()
        self._gate.clear()

    def release(self) -> None:
        """Answer what was held back."""
        self._gate.set()

    async def answer(self, request: HttpRequest) -> HttpResponse:
        """Serve one call."""
        if request.bearer != self._api_key:
            return json_response({"error": "wrong API key"}, 401)
        if (request.method, request.path) == ("GET", "/charges"):
            found = self.charges.get(request.query.get("key", ""))
            return json_response(asdict(found)) if found else json_response({"error": "no such charge"}, 404)
        if (request.method, request.path) != ("POST", "/charges"):
            return json_response({"error": "unknown call"}, 404)
        return await self._charge(request)

    async def _charge(self, request: HttpRequest) -> HttpResponse:
        key = request.headers.get("idempotency-key", "")
        try:
            cents = request.json()["cents"]
        except (ValueError, KeyError, TypeError):
            cents = None
        if not key or not isinstance(cents, int) or cents <= 0:
            return json_response({"error": "an Idempotency-Key and a positive number of cents are needed"}, 400)
        known = self.charges.get(key)
        if known is not None and known.cents != cents:
            return json_response({"error": "this key was used for another amount"}, 409)
        charge = known or Charge("ch_" + hashlib.blake2b(key.encode(), digest_size=8).hexdigest(), cents, key)
        self.calls += 1
        self.charges[key] = charge
        self.counted.set()
        await self._gate.wait()
        return json_response(asdict(charge))
