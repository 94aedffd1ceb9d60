"""How many threads torch computes with on a CPU.

More threads are slower, not faster, if the computer has less time for them than they ask for: every
operation waits for the thread that got the least. The number is measured unless the user gives it.
"""

import os
import time
from collections.abc import Callable

import torch

PROBE_SECONDS = 0.4
"""Duration of a measurement of numbers of threads."""
WORTHWHILE = 0.5
"""Share of the time with all threads below which fewer are used.

Threads that wait without spinning lose little to other programs, which may also end; a limit on the
processors' time, as containers have, stays.
"""


def use_threads(wanted: int | None, device: str = "cpu", recorded: int | None = None) -> str:
    """Set the number of threads to the one wanted, or to the fastest.

    ``OMP_NUM_THREADS``, which torch obeys, is a decision of the user; so is ``wanted``.

    Args:
        wanted: number of threads; ``None`` for the fastest.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA if available; on CUDA nothing is measured.
        recorded: number that the work was begun with, for the same bits.

    Returns:
        What was chosen and why, for the user; empty if it is what torch would use.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return ""
    if "OMP_NUM_THREADS" in os.environ:
        return ""
    if recorded is not None:
        torch.set_num_threads(recorded)
        return ""
    most = torch.get_num_threads()
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if most == 1 or not is_cpu:
        return ""
    seconds = measure_threads(candidates(most))
    best = min(seconds, key=lambda number: seconds[number])
    if seconds[best] > WORTHWHILE * seconds[most]:
        return ""
    torch.set_num_threads(best)
    return (
        f"using {best} of {most} threads: {most} are {seconds[most] / seconds[best]:.1f} times as "
        "slow at the moment (--threads chooses)"
    )


def candidates(most: int) -> list[int]:
    """Return the numbers of threads that are worth measuring: powers of two, and all."""
    return [*(2**k for k in range((most - 1).bit_length())), most]


def measure_threads(
    numbers: list[int], work: Callable[[], object] | None = None
) -> dict[int, float]:
    """Return the mean seconds of a piece of work by number of threads.

    The numbers take turns for :data:`PROBE_SECONDS`, at least once each, so that what else the
    computer does slows them alike. Afterwards torch uses as many threads as before.

    Args:
        numbers: numbers of threads.
        work: what to measure. (default: a feed-forward layer of a small model)
    """
    work = work or _feed_forward()
    before = torch.get_num_threads()
    total = dict.fromkeys(numbers, 0.0)
    rounds = 0
    try:
        for number in numbers:
            # Starts the threads.
            torch.set_num_threads(number)
            work()
        began = time.perf_counter()
        while not rounds or time.perf_counter() - began < PROBE_SECONDS:
            for number in numbers:
                torch.set_num_threads(number)
                start = time.perf_counter()
                work()
                total[number] += time.perf_counter() - start
            rounds += 1
    finally:
        torch.set_num_threads(before)
    return {number: seconds / rounds for number, seconds in total.items()}


def _feed_forward() -> Callable[[], object]:
    values, weight = torch.ones(512, 192), torch.ones(192, 512)

    def work() -> object:
        with torch.inference_mode():
            return torch.relu(values @ weight) @ weight.T

    return work
