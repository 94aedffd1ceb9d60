"""Worker processes that signals do not reach: their parent decides when they end.

A terminal sends Ctrl-C to all processes of a command, also to those that are still importing, where
it would end in tracebacks and aborts.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from bytelm.stopping import SIGNALS

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")


@contextmanager
def shielded() -> Iterator[None]:
    """Start processes in the block that SIGINT and SIGTERM do not reach (except on Windows).

    A signal to this process is not lost: it arrives after the block.
    """
    if not _CAN_BLOCK:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def accept_sigterm() -> None:
    """Let SIGTERM reach this process again, which :func:`shielded` started."""
    if _CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def ignore_sigint() -> None:
    """Leave Ctrl-C to the parent, on Windows too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
