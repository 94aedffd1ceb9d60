"""The server process: its socket, and its end after a signal."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from bytelm.errors import ConfigError
from bytelm.stopping import SIGNALS

BACKLOG = 2048
UNREAD_SECONDS = 5
"""Seconds in which clients can read that their requests were ended."""
KEEP_ALIVE_SECONDS = 75
"""Seconds after which idle connections are closed: clients should do it first, since a request that
arrives at that moment is lost."""
SWITCH_SECONDS = 0.0005
GRACE_SECONDS = 60
"""Longest time to finish the requests that are in progress when the server is stopped."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 chooses a free one.

    Raises:
        ConfigError: the address does not exist or is in use.
    """
    listening = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        # asyncio sends small parts at once only if the socket says that its protocol is TCP.
        listening = socket.socket(family, kind, socket.IPPROTO_TCP)
        if os.name == "posix":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        return listening
    except (OSError, OverflowError) as error:
        if listening is not None:
            listening.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port or --host"
        ) from None


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Keep a port, which port 0 chooses, from all who do not ask to share it (``SO_REUSEPORT``).

    Raises:
        ConfigError: as of :func:`listen`.
    """
    with listen(host, port) as listening:
        address = listening.getsockname()
    with socket.socket(listening.family, socket.SOCK_STREAM) as kept:
        if hasattr(socket, "SO_REUSEPORT"):
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # It does not listen, so that all connections are of the one that shares it.
            kept.bind(address)
        yield address[1]


def serve(app: FastAPI, listening: socket.socket, grace_seconds: int = GRACE_SECONDS) -> None:
    """Serve an application until SIGINT or SIGTERM, and finish what was started.

    Args:
        app: the application.
        listening: the socket.
        grace_seconds: longest time to finish.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds + UNREAD_SECONDS,
    )
    with _signals_end_normally(), _fast_switches():
        _Server(config, app.state.server.worker.end_all, grace_seconds).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Server that ends the requests that are left some time after it was stopped."""

    def __init__(
        self, config: uvicorn.Config, end_all: Callable[[], None], grace_seconds: int
    ) -> None:
        super().__init__(config)
        self._end_all, self._grace_seconds = end_all, grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting requests, and wait for those that are in progress."""
        asyncio.get_running_loop().call_later(self._grace_seconds, self._end_all)
        await super().shutdown(sockets)


@contextmanager
def _fast_switches() -> Iterator[None]:
    """Let threads take turns more often.

    With Python's 5 ms the event loop waits that long whenever a step of the engine is running.
    """
    seconds = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(seconds)


@contextmanager
def _signals_end_normally() -> Iterator[None]:
    """Ignore the signals that uvicorn raises again once it has stopped because of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
