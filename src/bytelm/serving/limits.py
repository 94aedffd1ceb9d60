"""What is checked before a request is read: keys, rates and sizes."""

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bytelm.serving.errors import ApiError, ClientGoneError
from bytelm.serving.settings import Settings

T = TypeVar("T")
PROTECTED = ("/v1/", "/metrics")
"""Beginnings of the paths that need a key."""
BODY_SECONDS = 30.0
"""Longest time in which the body of a request must arrive."""
MAX_STARTS = 8
"""Requests that begin in one turn of the event loop, so that a burst holds up nothing else."""
MAX_CLIENTS = 10_000
"""Clients whose rates are remembered."""


class RateLimiter:
    """A bucket of tokens for each client: one is taken by a request, and they come back in time.

    Args:
        per_minute: tokens that come back in a minute, and the most that a bucket holds.
    """

    def __init__(self, per_minute: float) -> None:
        self._per_second, self._most = per_minute / 60, max(per_minute, 1.0)
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tokens, and when there were that many."""

    def take(self, client: str, now: float | None = None) -> float:
        """Take a token, and return 0; or return the seconds until there is one."""
        now = time.monotonic() if now is None else now
        tokens = self._tokens(client, now)
        if tokens < 1:
            return (1 - tokens) / self._per_second
        if client not in self._buckets and len(self._buckets) >= MAX_CLIENTS:
            self._forget(now)
        self._buckets[client] = tokens - 1, now
        return 0.0

    def _tokens(self, client: str, now: float) -> float:
        tokens, since = self._buckets.get(client, (self._most, now))
        return min(tokens + (now - since) * self._per_second, self._most)

    def _forget(self, now: float) -> None:
        """Drop the buckets that are full, or else the one that was used first."""
        full = [one for one in self._buckets if self._tokens(one, now) >= self._most]
        for client in full or [next(iter(self._buckets))]:
            del self._buckets[client]


class Gate:
    """ASGI middleware that refuses requests without a key, too many of them, and large bodies.

    Of requests that come at the same instant a few begin in each turn of the event loop.
    The body is read here; the application finds the client's name as ``scope["client_name"]``.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        rate = settings.rate_limit
        self._limiter = None if rate is None else RateLimiter(rate)
        self._num_starts = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PROTECTED):
            await self._app(scope, receive, send)
            return
        await self._turn()
        try:
            headers = Headers(scope=scope)
            scope["client_name"] = self._admit(headers, scope.get("client"))
            body = await self._read(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except ClientGoneError:
            return
        await self._app(scope, _replay(body, receive), send)

    async def _turn(self) -> None:
        """Wait for a turn of the event loop in which few other requests begin."""
        while self._num_starts >= MAX_STARTS:
            await asyncio.sleep(0)
        if not self._num_starts:
            asyncio.get_running_loop().call_soon(self._end_turn)
        self._num_starts += 1

    def _end_turn(self) -> None:
        self._num_starts = 0

    def _admit(self, headers: Headers, address: tuple[str, int] | None) -> str:
        """Return the name of the client, which is its key or its address.

        Raises:
            ApiError: it has no valid key, or sent too many requests.
        """
        digest = self._digest(headers.get("authorization", ""))
        client = f"key {digest.hex()}" if digest else f"address {address[0] if address else ''}"
        wait = self._limiter.take(client) if self._limiter is not None else 0.0
        if wait:
            raise ApiError(
                429,
                f"more than {self._settings.rate_limit:g} requests per minute: retry later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil(wait))},
            )
        if self._keys and not digest:
            raise ApiError(
                401,
                "an API key is needed: send it as `Authorization: Bearer KEY`"
                if "authorization" not in headers
                else "the API key is wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return client

    def _digest(self, authorization: str) -> bytes | None:
        """Return the digest of the key that a client sent, if it is valid."""
        scheme, _, key = authorization.partition(" ")
        # Headers were decoded as Latin-1; keys are UTF-8.
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # All are compared, in constant time, so that timing tells nothing about any of them.
        found = [hmac.compare_digest(digest, one) for one in self._keys]
        return digest if scheme.lower() == "bearer" and any(found) else None

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Return the body.

        Raises:
            ApiError: it is too large, or does not arrive.
            ClientGoneError: the client disconnected.
        """
        limit = self._settings.max_body
        too_large = ApiError(
            413,
            f"the body is over the limit of {limit:,} bytes: shorten the prompt",
            headers={"Connection": "close"},
        )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {BODY_SECONDS:g} seconds: send it again"
            ) from None
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that yields a body that was read, and then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed


def deadline(ends: float) -> asyncio.Timeout:
    """Return a context that raises ``TimeoutError`` at a time of the monotonic clock."""
    return asyncio.timeout(ends - time.monotonic())


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of some work, which is cancelled when the client disconnects.

    Args:
        receive: the request's, whose body was read.
        work: what to wait for.

    Raises:
        ClientGoneError: the client disconnected.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
