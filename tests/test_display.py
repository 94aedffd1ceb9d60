import io
import threading
import time

import pytest
from rich.console import Console

from bytelm.display import explaining, si


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 "),
        (0.25, "0.25 "),
        (7, "7 "),
        (999.4, "999 "),
        (999.6, "1 k"),
        (123_456, "123 k"),
        (3.162e8, "316 M"),
        (9.999e11, "1 T"),
        (4.65e22, "4.65e+04 E"),
    ],
)
def test_numbers_have_three_digits_and_a_prefix(value, shown):
    assert si(value) == shown


def test_only_those_who_wait_are_told_why():
    console = Console(file=io.StringIO())
    with explaining(console, "why [b]", seconds=60.0):
        pass
    with explaining(console, "why [b]", seconds=60.0) as started:
        started()
    with explaining(console, "why [b]", seconds=0.0):
        deadline = time.monotonic() + 10
        while "why" not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.001)
    assert console.file.getvalue() == "why [b]\n"
    for one in threading.enumerate():
        if isinstance(one, threading.Timer):
            one.join(10)
            assert not one.is_alive()
