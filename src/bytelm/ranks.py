"""The rank of this process among those that torchrun or SLURM started together.

::

    torchrun --nproc-per-node 8 -m bytelm train RECIPE      RANK, WORLD_SIZE, LOCAL_RANK
    srun --ntasks-per-node 8 python -m bytelm train RECIPE  SLURM_PROCID, SLURM_STEP_NUM_TASKS, ...

``srun torchrun ...`` works as well: what torchrun sets takes precedence.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

FIRST_PORT, NUM_PORTS = 15000, 20000
"""Ports of rank 0 in SLURM jobs that name none; a job's number chooses, as jobs may share nodes."""


class Place(NamedTuple):
    """Place of a process among those that were started together."""

    rank: int = 0
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Rank among the processes of the node."""
    address: str | None = None
    """``HOST:PORT`` of rank 0; ``None`` if MASTER_ADDR and MASTER_PORT have it."""


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return the place of this process, from the variables that its launcher set."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local = environment.get("LOCAL_RANK", "0")
        return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(local))
    # A batch script has SLURM_NTASKS too, but is one process.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1:
        return Place()
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    chosen = FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % NUM_PORTS
    port = environment.get("MASTER_PORT", chosen)
    rank, local = (int(environment[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    return Place(rank, size, local, f"{host}:{port}")


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list, such as ``gpu003`` of ``gpu[003-010,12],login1``."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None, nodes
    return "".join(part or "" for part in found.groups())
