"""Metrics for Prometheus, in a registry of their own."""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bytelm.inference import Stats
from bytelm.serving.errors import CLIENT_GONE

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
GAUGES = {
    "num_waiting": ("requests_waiting", "Continuations that have not begun"),
    "num_reading": ("requests_reading", "Continuations whose prompts are being read"),
    "num_decoding": ("requests_decoding", "Continuations that are being generated"),
    "pages_used": ("pages_used", "Pages of the shared caches in use"),
    "num_pages": ("pages", "Pages of the shared caches"),
}
COUNTERS = {
    "bytes_generated": ("bytes_generated", "Bytes generated"),
    "num_steps": ("steps", "Byte steps of the engine"),
    "ids_read": ("prompt_ids_read", "Ids of prompts that were read"),
    "ids_reused": ("prompt_ids_reused", "Ids of prompts that were in memory already"),
    "num_drafted": ("bytes_drafted", "Bytes drafted by speculation"),
    "num_accepted": ("bytes_accepted", "Drafted bytes that were accepted"),
    "bytes_moved": ("weight_bytes_read", "Bytes of weights read to decode"),
    "num_preempted": ("preemptions", "Times that a continuation had to wait again"),
}


class _EngineCollector(Collector):
    """What the engine is doing, read when the metrics are."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for field, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(f"bytelm_{name}", text, getattr(stats, field))
        for field, (name, text) in COUNTERS.items():
            yield CounterMetricFamily(f"bytelm_{name}", text, getattr(stats, field))


class _Labelled(Collector):
    """Metrics of a registry, with more labels."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry, self._labels = registry, labels

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [
                one._replace(labels={**one.labels, **self._labels}) for one in metric.samples
            ]
            yield metric


class Metrics:
    """Metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.labels: dict[str, str] = {}
        """Labels of all metrics."""
        self._requests = Counter(
            "bytelm_http_requests",
            "Requests answered",
            ("method", "path", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "bytelm_http_request_seconds",
            "Time from a request to the end of its answer",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._first_seconds = Histogram(
            "bytelm_time_to_first_byte_seconds",
            "Time from a completion request to the first part of its body",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "bytelm_step_seconds", "Time of a step of the engine", buckets=STEP_SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, stats: Callable[[], Stats]) -> None:
        """Add the metrics of an engine."""
        self.registry.register(_EngineCollector(stats))

    def on_step(self, seconds: float) -> None:
        """Count a step of the engine."""
        self._step_seconds.observe(seconds)

    def on_request(
        self, scope: Scope, status: int, seconds: float, first_seconds: float | None
    ) -> None:
        """Count a request."""
        # Paths that have no route are one label: a client could make up any number of them.
        path = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "OPTIONS") else "other"
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        if path == "/v1/completions" and status == 200 and first_seconds is not None:
            self._first_seconds.observe(first_seconds)

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        if not self.labels:
            return generate_latest(self.registry)
        labelled = CollectorRegistry()
        labelled.register(_Labelled(self.registry, self.labels))
        return generate_latest(labelled)


class Measured:
    """ASGI middleware that counts requests and measures how long they take."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status, first = CLIENT_GONE, None

        async def watched(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first is None and message.get("body"):
                first = time.perf_counter() - began
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._metrics.on_request(scope, status, time.perf_counter() - began, first)
