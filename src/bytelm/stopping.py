"""Requests to stop long work: signals, a time limit, a callback.

Work that may be abandoned (the gradients of a step, a validation) is interrupted at once; all
other work (an update of the parameters, a checkpoint) is completed first::

    stop = Stopping(time_limit=60)
    with stop.listening():
        while not stop.reason:
            with stop.interruptible():
                gradients = compute()       # a request raises Stopped in here
            update(gradients)               # a request is noted

A second signal raises ``KeyboardInterrupt`` wherever it arrives: files are complete or absent.
"""

import _thread
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 0.3
"""Signals this close together are one request: `timeout` sends them to a process and its group."""
OVERTIME = 1.5
"""Seconds after the time limit in which work that may be abandoned can still be completed."""


class Stopped(KeyboardInterrupt):
    """Raised in work that is abandoned because a stop was requested."""


class Stopping:
    """Requests to stop, and where they may interrupt.

    Args:
        time_limit: seconds from now until a stop is requested; ``None`` for no limit.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None
        """Why a stop was requested, such as ``SIGINT``; ``None`` if it was not."""
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._can_interrupt = self._is_alarm = False
        self._signalled: float | None = None

    def request(self, reason: str) -> None:
        """Request a stop; the first reason is kept."""
        self.reason = self.reason or reason

    @property
    def is_late(self) -> bool:
        """Whether the time limit has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def agree(self) -> None:
        """Request a stop if the time limit has passed; called between pieces of work."""
        if self.is_late:
            self.request("time limit")

    def check(self) -> None:
        """Interrupt work that may be abandoned if a stop was requested, or it takes overtime.

        Loops call this because signals interrupt the main thread only.

        Raises:
            Stopped: a stop was requested.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline + OVERTIME:
            self.request("time limit")
        if self.reason:
            self._can_interrupt = False
            raise Stopped(self.reason)

    def check_together(self) -> None:
        """Check, where all processes that share the work do; see :meth:`check`."""
        self.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run a block that may be abandoned.

        Raises:
            Stopped: a stop was requested, before the block or during it.
        """
        self._can_interrupt = True
        try:
            # After the line above, so that no signal falls between the two.
            self.check()
            yield
        finally:
            self._can_interrupt = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Make signals and the time limit interrupt the block, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        alarm = self._start_alarm()
        try:
            yield
        finally:
            if alarm is not None:
                alarm.cancel()
                alarm.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start_alarm(self) -> threading.Timer | None:
        """Start the thread that waits for the end of the overtime, and then interrupts."""
        if self._deadline is None:
            return None
        seconds = self._deadline + OVERTIME - time.monotonic()
        alarm = threading.Timer(max(seconds, 0.0), self._ring)
        alarm.daemon = True
        alarm.start()
        return alarm

    def _ring(self) -> None:
        self._is_alarm = True
        # The main thread calls the handler of the signal, as if the signal had arrived.
        _thread.interrupt_main(signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_alarm:
            self._is_alarm = False
            self.request("time limit")
        else:
            now = time.monotonic()
            self.request(signal.Signals(number).name)
            if self._signalled is not None and now - self._signalled > SAME_SECONDS:
                raise KeyboardInterrupt
            self._signalled = self._signalled or now
        if self._can_interrupt and not is_importing(frame):
            self._can_interrupt = False
            raise Stopped(self.reason)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a frame is inside an import; exceptions there can abort C++ libraries."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
