"""Functions on several ranks: processes that torchrun would have started, with a deadline."""

import multiprocessing
import os
import random
import socket
import time
import traceback
from contextlib import suppress

CONTEXT = multiprocessing.get_context("forkserver")
# Importing torch takes seconds; the server does it once.
CONTEXT.set_forkserver_preload(["bytelm.training", "torch.distributed.fsdp"])


def free_port():
    """A port that nothing gets by chance: systems choose those from 32768 on, Ray below 20000."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def _run(rank, size, port, function, arguments, connection):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    try:
        connection.send((True, function(*arguments)))
    except BaseException as error:
        # The parent raises it; what cannot be sent is described.
        with suppress(Exception):
            error.add_note(traceback.format_exc())
        connection.send((False, error))


def on_ranks(size, function, *arguments, seconds=120, may_die=()):
    """Call a function on each rank of a world; return the results, ``None`` for ranks that died.

    Raises:
        TimeoutError: they have not ended in time; all are killed.
        Exception: the first error.
    """
    port, ends = free_port(), [CONTEXT.Pipe() for _ in range(size)]
    processes = [
        CONTEXT.Process(target=_run, args=(r, size, port, function, arguments, ends[r][1]))
        for r in range(size)
    ]
    until = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for _, theirs in ends:
            theirs.close()
        answers = []
        for rank, (mine, _) in enumerate(ends):
            if not mine.poll(max(until - time.monotonic(), 0)):
                raise TimeoutError(f"rank {rank} of {size} has not answered in {seconds} s")
            try:
                answers.append(mine.recv())
            except EOFError:
                assert rank in may_die, f"rank {rank} died"
                answers.append((True, None))
    finally:
        for process in processes:
            process.kill()
            process.join()
    for succeeded, answer in answers:
        if not succeeded:
            raise answer
    return [answer for _, answer in answers]
