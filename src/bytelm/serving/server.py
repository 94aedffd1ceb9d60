"""The server process: its socket, and its end after a signal."""

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from bytelm.errors import ConfigError
from bytelm.stopping import SIGNALS

BACKLOG = 2048
GRACE_SECONDS = 60
"""Longest time to finish the requests that are in progress when the server is stopped."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 chooses a free one.

    Raises:
        ConfigError: the address does not exist or is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port or --host"
        ) from None


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
        timeout_graceful_shutdown=grace_seconds,
    )
    with _signals_end_normally():
        uvicorn.Server(config).run(sockets=[listening])


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
