"""A server in a thread of the tests, with tiny models and engines that follow a script."""

import asyncio
import contextlib
import json
import threading
import time

import httpx
import uvicorn

from builders import random_patched
from bytelm.checkpoint import CheckpointConfig
from bytelm.inference import Event, Generated, Stats
from bytelm.language_model import LanguageModel
from bytelm.serving import Settings, create_app, listen
from test_checkpoint import patched_description


def tiny_lm() -> LanguageModel:
    module = random_patched(reset=True)
    return LanguageModel(module, CheckpointConfig(**dict(patched_description(module))))


class Running:
    """A server that runs."""

    def __init__(self, app, url):
        self.app, self.url = app, url
        self.server = app.state.server

    @property
    def worker(self):
        return self.server.worker

    def wait_until(self, condition, seconds=10.0):
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, "this should have happened by now"
            time.sleep(0.002)

    def assert_idle(self):
        """Nothing is left of any request: no slots, no open requests, no memory but prefixes."""
        self.wait_until(lambda: not self.worker._running and not self.worker._num_open)
        stats = self.worker._engine.stats()
        assert (stats.num_waiting, stats.num_reading, stats.num_decoding) == (0, 0, 0)
        forget = getattr(self.worker._engine, "forget", None)
        if forget is not None:
            forget()
            assert self.worker._engine.stats().pages_used == 0


@contextlib.contextmanager
def running(lm=None, engine=None, **settings):
    """Run a server; it must be idle at the end."""
    app = create_app(lm or tiny_lm(), Settings(**{"name": "tiny", **settings}), engine)
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(app, lifespan="on", log_level="critical", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            found = Running(app, url)
            found.wait_until(lambda: server.started)
            yield found
            found.assert_idle()
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


class ScriptedEngine:
    """Engine whose requests count up; steps can be slow, fail, or fail single requests."""

    def __init__(self, seconds=0.0, size=1):
        self.seconds, self.size = seconds, size
        self.failures: list[Exception] = []
        """Exceptions that the next steps raise."""
        self.fail_tickets: dict[int, Exception] = {}
        self.open: dict[int, list] = {}
        self.cancelled: list[int] = []
        self.num_steps = 0
        self._next = 0

    def submit(self, request):
        ticket, self._next = self._next, self._next + 1
        self.open[ticket] = [request, 0]
        return ticket

    def cancel(self, ticket):
        if self.open.pop(ticket, None):
            self.cancelled.append(ticket)

    def step(self):
        self.num_steps += 1
        time.sleep(self.seconds)
        if self.failures:
            raise self.failures.pop()
        events = []
        for ticket, entry in list(self.open.items()):
            request, done = entry
            if ticket in self.fail_tickets:
                events.append(Event(ticket, None, self.fail_tickets.pop(ticket)))
                del self.open[ticket]
                continue
            entry[1] = done + 1
            finish = "length" if done + 1 >= request.max_bytes else None
            events.append(Event(ticket, Generated(b"%d" % (done % 10) * self.size, finish)))
            if finish:
                del self.open[ticket]
        return events

    def stats(self):
        return Stats(0, 0, len(self.open), self.num_steps, *[0] * 8)


def sse(lines):
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def stream_chunks(url, headers=None, **body):
    """All chunks of a stream, and whether it was completed."""
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"stream": True, **body}, headers=headers
    ) as found:
        assert found.status_code == 200, found.read()
        events = sse(found.iter_lines())
    done = events[-1] == "[DONE]"
    return [json.loads(e) for e in events if e != "[DONE]"], done


def gather(*tasks):
    async def run():
        return await asyncio.gather(*tasks)

    return asyncio.run(run())
