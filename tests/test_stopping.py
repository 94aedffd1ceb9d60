"""Requests to stop: what they interrupt, and what they leave alone."""

import signal
import sys
import threading
import time

import pytest

from bytelm import stopping
from bytelm.stopping import SAME_SECONDS, SIGNALS, Stopped, Stopping


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], threading.active_count()
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert threading.active_count() == threads


@pytest.fixture
def clock(monkeypatch):
    """Let tests set the time."""
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def spin():
    """Work of many small parts that never looks whether it should stop."""
    until = time.perf_counter() + 60
    while time.perf_counter() < until:
        sum(range(1000))
    raise AssertionError("not interrupted")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_work_that_may_be_abandoned_at_once(number):
    stop, reached = Stopping(), []

    def work():
        with stop.interruptible():
            reached.append("before")
            signal.raise_signal(number)
            reached.append("after")

    with stop.listening(), pytest.raises(Stopped, match=number.name):
        work()
    assert (stop.reason, reached) == (number.name, ["before"])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_other_work_be_completed(number):
    stop, reached = Stopping(), []
    with stop.listening():
        with stop.interruptible():
            pass
        signal.raise_signal(number)
        reached.append("after")
        with pytest.raises(Stopped), stop.interruptible():
            reached.append("abandoned")
    assert (stop.reason, reached) == (number.name, ["after"])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_everything_at_once(clock, number):
    with Stopping().listening():
        signal.raise_signal(number)
        clock[0] += SAME_SECONDS / 2
        signal.raise_signal(number)  # as of `timeout`, which sends two
        clock[0] += SAME_SECONDS
        with pytest.raises(KeyboardInterrupt) as found:
            signal.raise_signal(number)
    assert found.type is KeyboardInterrupt


def test_a_time_limit_interrupts_work_that_does_not_look(monkeypatch):
    monkeypatch.setattr(stopping, "OVERTIME", 0.05)
    stop = Stopping(0.0)
    with stop.listening(), pytest.raises(Stopped, match="time limit"), stop.interruptible():
        spin()
    assert stop.reason == "time limit"


def test_work_has_some_overtime_to_end(clock):
    stop = Stopping(5.0)
    assert not stop.is_late
    clock[0] += 5.0
    assert stop.is_late
    stop.check()
    with stop.interruptible():
        clock[0] += stopping.OVERTIME
    with pytest.raises(Stopped, match="time limit"):
        stop.check()


def test_a_time_limit_after_the_work_interrupts_nothing():
    with Stopping(3600.0).listening():
        assert threading.active_count() > 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_time_limit_there_is_no_thread():
    before = threading.active_count()
    with Stopping().listening():
        assert threading.active_count() == before


def test_another_thread_learns_of_the_time_limit_where_it_checks(clock):
    stop, found = Stopping(5.0), []

    def work():
        with stop.listening(), stop.interruptible():
            stop.check()
            clock[0] += 5.0 + stopping.OVERTIME
            try:
                stop.check()
            except Stopped as error:
                found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["time limit"]


def test_an_import_is_completed(tmp_path, monkeypatch):
    """An exception in the middle of one can abort a C++ library."""
    (tmp_path / "interrupted.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\ncomplete = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stop = Stopping()
    with stop.listening(), stop.interruptible():
        import interrupted

        assert interrupted.complete
        with pytest.raises(Stopped):
            stop.check()
    del sys.modules["interrupted"]


def test_the_first_reason_is_kept():
    stop = Stopping()
    stop.request("callback")
    stop.request("time limit")
    with pytest.raises(Stopped, match="callback"):
        stop.check()
