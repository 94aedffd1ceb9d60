"""Replicas of the application on Ray Serve, behind one address.

A replica is a process with the application of :mod:`bytelm.serving.app`: its own copy of the model,
its own engine, its own limits and metrics. One proxy accepts connections and hands each request to
a replica: to the less busy of two, or, for requests with the header ``X-Session-Id``, always to the
same one, which may still keep the beginning of the prompt.
"""

import asyncio
import hashlib
import logging
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bytelm.checkpoint import Precision
from bytelm.cluster import ADDRESS, connect
from bytelm.errors import ConfigError
from bytelm.language_model import load
from bytelm.layout import check_checkpoint, find_checkpoint
from bytelm.serving.app import create_app
from bytelm.serving.errors import StoppingError, api_error
from bytelm.serving.server import (
    GRACE_SECONDS,
    KEEP_ALIVE_SECONDS,
    SWITCH_SECONDS,
    UNREAD_SECONDS,
    reserved,
)
from bytelm.serving.settings import Settings
from bytelm.threads import use_threads

NAME = "bytelm"
"""Name of the application on Ray Serve."""
HEADER = "X-Replica"
"""Header of responses that names the replica."""
OTHER_REQUESTS = 64
"""Requests to a replica that are not continuations, such as ``/health`` and ``/metrics``.

What the engine's queue has no room for must still reach the replica, which explains it.
"""
OBJECT_STORE_BYTES = 128 << 20
"""Shared memory of a local Ray, which is used for large requests only."""
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
POLL_SECONDS = 0.05
HEALTH_SECONDS = 5.0
"""Seconds between health checks."""
STARTS = 2
"""Times that a replica may fail to start before its error is reported."""


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas there are, and what each computes with."""

    num_replicas: int = 1
    threads: int | None = None
    """Threads of each replica; ``None`` for ``OMP_NUM_THREADS``, or a share of the processors."""
    device: str = "auto"
    """``cpu``, ``cuda``, or ``auto`` for CUDA if Ray has GPUs. On CUDA a replica takes one GPU."""
    precision: Precision = "auto"
    grace_seconds: int = GRACE_SECONDS
    """Longest time to finish the requests that are in progress when a replica is stopped."""

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError(f"num_replicas must be at least 1, not {self.num_replicas}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")


class Traffic:
    """Requests to a replica: how many are in progress, and whether more are answered."""

    def __init__(self, name: str) -> None:
        self.name = name
        """Name of the replica."""
        self.num_open = 0
        """Requests in progress."""
        self.is_stopping = False


class Counted:
    """ASGI middleware that counts requests, refuses them at the end, and names the replica."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app, self._traffic = app, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = self._traffic.name
            await send(message)

        if self._traffic.is_stopping:
            await api_error(StoppingError()).response()(scope, receive, named)
            return
        self._traffic.num_open += 1
        try:
            await self._app(scope, receive, named)
        finally:
            self._traffic.num_open -= 1


class SessionRouter(RequestRouter):
    """Chooses the replica of a session, or the less busy of two for requests without one.

    Each replica gets a hash of its name and the session's, and the largest wins: if a replica
    ends, only its own sessions move.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas, of which the first that has room gets the request."""
        session = ""
        if pending_request is not None:
            session = pending_request.metadata.session_id
            # If no replica has room, wait a little longer each time.
            pending_request.routing_context.should_backoff = True
        if session:
            named = {one.replica_id.unique_id: one for one in candidate_replicas}
            return [[named[name]] for name in ranked(session, named)]
        # Ray's own router has no public name, but this is its rule.
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


def ranked(session: str, names: Iterable[str]) -> list[str]:
    """Return the names of replicas in the order in which a session prefers them."""

    def preference(name: str) -> bytes:
        return hashlib.sha256(f"{name} {session}".encode()).digest()

    return sorted(names, key=preference, reverse=True)


class Replica:
    """What Ray asks of a replica besides answering requests."""

    app: FastAPI

    def check_health(self) -> None:
        """Raise if the replica must be replaced."""
        if not self.app.state.server.worker.is_alive:
            raise RuntimeError("the thread of the engine has ended")

    async def finish(self, seconds: float) -> None:
        """Refuse further requests, and wait for those in progress, which end after some time."""
        traffic: Traffic = self.app.state.traffic
        traffic.is_stopping = True
        ends = time.monotonic() + seconds
        while traffic.num_open and time.monotonic() < ends:
            await asyncio.sleep(POLL_SECONDS)
        self.app.state.server.worker.end_all()
        while traffic.num_open and time.monotonic() < ends + UNREAD_SECONDS:
            await asyncio.sleep(POLL_SECONDS)


def application(
    checkpoint: Path, settings: Settings, options: ReplicaOptions, cpus: int, gpus: int
) -> serve.Application:
    """Return the application for ``ray.serve.run``.

    Args:
        checkpoint: folder that every node can read.
        settings: settings of each replica.
        options: number of replicas, and what each computes with.
        cpus: processors that each replica reserves, and its number of threads.
        gpus: GPUs that each replica reserves.
    """
    device = "cuda" if gpus else "cpu"

    def build() -> FastAPI:
        sys.setswitchinterval(SWITCH_SECONDS)
        use_threads(cpus, device)
        app = create_app(load(checkpoint, device, options.precision), settings)
        name = serve.get_replica_context().replica_id.unique_id
        app.state.server.metrics.labels = {"replica": name}
        app.state.traffic = Traffic(name)
        app.add_middleware(Counted, traffic=app.state.traffic)
        return app

    deployment = serve.deployment(
        name=NAME,
        num_replicas=options.num_replicas,
        max_ongoing_requests=settings.max_open + OTHER_REQUESTS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=POLL_SECONDS,
        graceful_shutdown_timeout_s=options.grace_seconds + UNREAD_SECONDS,
        max_constructor_retry_count=STARTS,
        logging_config=LOGGING,
        request_router_config={"request_router_class": f"{__name__}:SessionRouter"},
    )
    return deployment(serve.ingress(build)(Replica)).bind()


@contextmanager
def deployed(
    checkpoint: Path, settings: Settings, options: ReplicaOptions, host: str, port: int
) -> Iterator[int]:
    """Run replicas on a new Ray on this computer, or on the cluster at ``RAY_ADDRESS``.

    At the end no more requests are accepted, and those in progress are completed.

    Yields:
        The port.

    Raises:
        ConfigError: the address cannot be used, the resources do not suffice, or the replicas
            cannot start.
        CheckpointError: the checkpoint is missing or damaged.
    """
    # All replicas, and those that replace them, load the same one, even if training continues.
    folder = find_checkpoint(checkpoint).resolve()
    check_checkpoint(folder)
    address = os.environ.get(ADDRESS)
    with ExitStack() as stack:
        if not address:
            # Otherwise a process of Ray may take it before its proxy does.
            port = stack.enter_context(reserved(host, port))
        elif not port:
            raise ConfigError(f"--port 0 needs a Ray of its own: choose a port, or unset {ADDRESS}")
        stack.callback(ray.shutdown)
        _connect(options)
        cpus, gpus = resources(options, ray.nodes())
        app = application(folder, settings, options, cpus, gpus)
        _check_serve()
        if address:
            # A Ray of our own ends as a whole.
            stack.callback(serve.shutdown)
        _deploy(app, host, port)
        yield port
        _end(options.grace_seconds)


def wait_until_stopped() -> None:
    """Wait for SIGINT or SIGTERM."""
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        return


def resources(options: ReplicaOptions, nodes: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the processors and the GPUs of each replica.

    Args:
        options: number of replicas, and what each computes with.
        nodes: nodes of the cluster, as :func:`ray.nodes` lists them.

    Raises:
        ConfigError: there are too few.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    has_gpus = any(node.get("GPU", 0) >= 1 for node in alive)
    gpus = int(options.device == "cuda" or (options.device == "auto" and has_gpus))
    cpus = options.threads
    if cpus is None and os.environ.get("OMP_NUM_THREADS", "").isdecimal():
        cpus = max(int(os.environ["OMP_NUM_THREADS"]), 1)
    if cpus is None and gpus:
        cpus = 1
    if cpus is None:
        per_node = math.ceil(options.num_replicas / len(alive))
        smallest = min((node["CPU"] for node in alive if node.get("CPU", 0) >= 1), default=1)
        cpus = max(int(smallest) // per_node, 1)
    room = sum(
        int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if gpus else math.inf))
        for node in alive
    )
    if room < options.num_replicas:
        need = f"{cpus} processors" + (" and a GPU" if gpus else "")
        raise ConfigError(
            f"Ray has room for {room} replicas of {options.num_replicas}, which take {need} each: "
            "choose fewer --replicas or --threads, or --device cpu"
        )
    return cpus, gpus


def _connect(options: ReplicaOptions) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    cpus = max(os.cpu_count() or 1, options.num_replicas * (options.threads or 1))
    connect(cpus, object_store_memory=OBJECT_STORE_BYTES)


def _check_serve() -> None:
    if serve.status().proxies:
        raise ConfigError(
            f"Ray Serve already runs on the cluster at {os.environ.get(ADDRESS)}, at an address of "
            "its own: deploy bytelm.serving.replicas.application there with ray.serve.run"
        )


def _deploy(app: serve.Application, host: str, port: int) -> None:
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_SECONDS},
        logging_config=LOGGING,
    )
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[NAME].deployments.values()
        messages = "\n".join([str(error), *(one.message for one in deployments)])
        found = re.findall(r"bytelm\.errors\.\w+: (.+)", messages)
        reason = found[-1].strip() if found else f"the replicas cannot start: {messages}"
        raise ConfigError(reason) from None


def _end(grace_seconds: int) -> None:
    """End the requests first, since the proxy carries their answers, and then the replicas."""
    seconds = grace_seconds + 2 * UNREAD_SECONDS
    replicas = serve.get_app_handle(NAME).broadcast("finish", grace_seconds)
    with suppress(TimeoutError, RayError):
        replicas.results(timeout_s=seconds, return_exceptions=True)
    serve.delete(NAME)
