"""Connect to Ray: a new one on this computer, or the cluster at ``RAY_ADDRESS``."""

import logging
import os
import signal
from typing import Any

import ray

from bytelm.errors import ConfigError
from bytelm.stopping import SIGNALS

ADDRESS = "RAY_ADDRESS"
"""Environment variable with the address of a Ray cluster."""


def connect(num_cpus: int, **own: Any) -> None:
    """Connect to the cluster at ``RAY_ADDRESS`` if it is set, otherwise start a Ray.

    ``ray.shutdown`` ends the connection, and a Ray that was started here.

    Args:
        num_cpus: processors of a Ray that is started here.
        own: other arguments of ``ray.init`` for a Ray that is started here.

    Raises:
        ConfigError: Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get(ADDRESS)
    arguments: dict[str, Any] = {}
    if not address:
        arguments = {"num_cpus": num_cpus, "include_dashboard": False, **own}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, **arguments)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {address}: check {ADDRESS}" if address else "here"
        raise ConfigError(f"Ray cannot be used {where}: {error}") from error
    finally:
        # Ray has a handler of its own, which exits.
        for number, handler in handlers.items():
            signal.signal(number, handler)
