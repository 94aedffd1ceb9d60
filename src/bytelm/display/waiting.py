"""An explanation for those who wait."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

COMPILING = (
    "compiling kernels for this processor: up to a minute, the first time on a computer only"
)


@contextmanager
def explaining(console: Console, text: str, seconds: float = 3.0) -> Iterator[Callable[[], None]]:
    """Print a line if the block has not ended after some seconds.

    Args:
        console: where to print.
        text: the line.
        seconds: how long to wait before it is printed.

    Yields:
        A function that ends the waiting before the block does.
    """
    timer = threading.Timer(
        seconds, lambda: console.print(text, highlight=False, markup=False, soft_wrap=True)
    )
    timer.daemon = True
    timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()
