"""The server under load, with clients that misbehave and an engine that fails."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import schemathesis

from bytelm.display.waiting import COMPILING
from bytelm.errors import ConfigError
from bytelm.inference import Engine, Sampling, generate
from bytelm.serving import app, listen
from bytelm.serving.server import reserved
from serving_clients import ScriptedEngine, running, sse, stream_chunks, tiny_lm


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def open_stream(server, **body):
    """A socket that has sent a request for a stream and reads nothing."""
    content = json.dumps({"stream": True, **body}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_disconnect_free_their_slots_within_a_step(lm, stream):
    engine = ScriptedEngine(0.02)
    with running(lm, engine) as server:
        connection = open_stream(server, prompt="a", max_tokens=100_000, n=3, stream=stream)
        server.wait_until(lambda: len(engine.open) == 3)
        if stream:
            assert connection.recv(100)
        connection.close()
        server.wait_until(lambda: len(engine.cancelled) == 3, seconds=2.0)
        assert engine.open == {}
        # The connection said nothing more, and nobody else was disturbed.
        found = httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 3})
        assert found.json()["choices"][0]["text"] == "012"


def test_clients_that_disconnect_while_they_wait_leave_the_queue(lm, monkeypatch):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)
    # With this seed the first client's document does not end before.
    body = {"prompt": "a", "max_tokens": 300, "seed": 28, "stream": True}
    with (
        running(lm, num_slots=1) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body),
    ):
        # Not the first client, which has an answer before its prompt is read.
        server.wait_until(lambda: server.worker.stats.num_decoding == 1)
        connection = open_stream(server, prompt="b", max_tokens=300)
        server.wait_until(lambda: server.worker.stats.num_waiting == 1)
        connection.close()
        server.wait_until(lambda: server.worker.stats.num_waiting == 0)
        assert server.worker.stats.num_decoding == 1


@pytest.mark.parametrize("num_clients", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_many_clients_of_which_a_third_disconnect(lm, num_clients):
    """Everyone who stays gets the bytes that they would have got alone; nothing is left behind."""
    seeds = range(8)
    alone = [
        generate(lm.module, b"prompt", max_bytes=16, sampling=Sampling(1.0, seed=seed))
        for seed in seeds
    ]

    async def client(http, number):
        seed = number % len(seeds)
        body = {
            "prompt": "prompt", "max_tokens": 16, "seed": seed, "stream": True, "logprobs": 0,
        }  # fmt: skip
        data = b""
        async with http.stream("POST", "/v1/completions", json=body) as found:
            assert found.status_code == 200
            async for line in found.aiter_lines():
                for event in sse([line]):
                    if event == "[DONE]":
                        return data == alone[seed]
                    (choice,) = json.loads(event)["choices"]
                    data += bytes(choice["logprobs"]["bytes"])
                if number % 10 < 3 and len(data) > number % 12:
                    return None
                if number % 10 == 9:
                    await asyncio.sleep(0.02)
        raise AssertionError("the stream was cut")

    async def run(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(client(http, number) for number in range(num_clients)))

    with running(lm, max_open=num_clients, num_slots=num_clients // 5) as server:
        delays = Health(server.url)
        with delays:
            found = asyncio.run(run(server.url))
        assert found.count(None) == num_clients * 3 // 10
        assert found.count(True) == num_clients * 7 // 10
        assert delays.median < 0.1


class Health:
    """Asks for the server's health all the time, as a context, and measures how long it takes."""

    def __init__(self, url):
        self.url, self.seconds, self._stop = url, [], threading.Event()
        self._thread = threading.Thread(target=self._ask)

    @property
    def median(self):
        return sorted(self.seconds)[len(self.seconds) // 2]

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _ask(self):
        with httpx.Client(base_url=self.url) as http:
            while not self._stop.wait(0.01):
                began = time.perf_counter()
                assert http.get("/health").status_code == 200
                self.seconds.append(time.perf_counter() - began)


def test_health_is_answered_while_the_engine_and_patching_are_slow(lm, monkeypatch):
    engine = ScriptedEngine(0.5)

    def slow(*arguments, **options):
        time.sleep(1)
        return lm.__class__.patch(lm, *arguments, **options)

    monkeypatch.setattr(lm, "patch", slow, raising=False)
    with running(lm, engine) as server:
        patched = threading.Thread(
            target=lambda: httpx.post(f"{server.url}/v1/patches", json={"text": "a"})
        )
        patched.start()
        health = Health(server.url)
        with health:
            found = httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 3})
        patched.join()
        assert found.status_code == 200
        assert len(health.seconds) > 50
        # The others are those of a busy computer: a loop that is blocked answers three in all.
        assert sorted(health.seconds)[len(health.seconds) * 9 // 10] < 0.1


def test_slow_readers_do_not_hold_up_the_engine(lm):
    # Twenty megabytes, which no buffer of the system holds.
    engine = ScriptedEngine(size=10_000)
    with running(lm, engine) as server:
        with open_stream(server, max_tokens=2000) as slow:
            server.wait_until(lambda: engine.num_steps >= 2000 and not engine.open)
            chunks, done = stream_chunks(server.url, max_tokens=5)
            assert done
            assert len(chunks) == 5
            received = bytearray()
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += slow.recv(1 << 20)
        assert received.count(b"data: ") == 2001


def test_readers_that_never_read_are_left(lm, monkeypatch):
    monkeypatch.setattr(app, "UNREAD_SECONDS", 0.1)
    engine = ScriptedEngine(size=10_000)
    ended = b'bytelm_http_requests_total{method="POST",path="/v1/completions",status="200"} 1.0'
    with running(lm, engine, timeout=1.0) as server:
        with open_stream(server, max_tokens=2000):
            server.wait_until(lambda: ended in server.server.metrics.text())
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_exception_in_a_step_fails_only_the_requests_in_it(lm):
    engine = ScriptedEngine(0.01)
    with running(lm, engine) as server:
        url = f"{server.url}/v1/completions"
        engine.failures = [RuntimeError("secret")]
        found = httpx.post(url, json={"max_tokens": 5})
        assert found.status_code == 500
        error = found.json()["error"]
        assert error["type"] == "server_error"
        assert "secret" not in error["message"]
        assert httpx.post(url, json={"max_tokens": 5}).status_code == 200
        # One of two: its neighbour goes on.
        engine.fail_tickets = {engine._next + 1: ValueError("secret")}
        neighbour = []
        thread = threading.Thread(
            target=lambda: neighbour.append(stream_chunks(server.url, max_tokens=40))
        )
        thread.start()
        server.wait_until(lambda: engine.open)
        chunks, done = stream_chunks(server.url, max_tokens=5)
        thread.join()
        assert not done
        assert chunks[-1]["error"]["type"] == "server_error"
        chunks, done = neighbour[0]
        assert done
        assert len(chunks) == 40
        # One choice of three fails the whole request; the others are cancelled.
        engine.fail_tickets = {engine._next + 2: ValueError("secret")}
        assert httpx.post(url, json={"max_tokens": 5, "n": 3}).status_code == 500


def test_an_exception_in_the_model_fails_only_the_requests_in_the_batch(lm, monkeypatch):
    with running(lm) as server:
        url, state = f"{server.url}/v1/completions", server.worker._engine._state
        decode = state.decode
        is_broken = True

        def broken(*arguments):
            if is_broken:
                raise RuntimeError("secret")
            return decode(*arguments)

        monkeypatch.setattr(state, "decode", broken, raising=False)
        found = httpx.post(url, json={"prompt": "a", "max_tokens": 5})
        assert found.status_code == 500
        is_broken = False
        assert httpx.post(url, json={"prompt": "a", "max_tokens": 5}).status_code == 200


def test_errors_in_streams_are_raised_by_the_openai_client(lm):
    import openai

    engine = ScriptedEngine(0.01)
    with running(lm, engine) as server:
        engine.fail_tickets = {}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
            stream = client.completions.create(
                model="tiny", prompt="a", max_tokens=1000, stream=True
            )
            next(stream)
            engine.fail_tickets = {0: ValueError()}
            with pytest.raises(openai.APIError, match="could not answer"):
                list(stream)


def test_requests_that_take_too_long_are_ended(lm):
    engine = ScriptedEngine(0.02)
    with running(lm, engine, timeout=0.3) as server:
        found = httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 10_000})
        assert found.status_code == 504
        assert found.json()["error"]["type"] == "timeout_error"
        chunks, done = stream_chunks(server.url, max_tokens=10_000)
        assert len(chunks) > 3
        assert not done
        assert chunks[-1]["error"]["type"] == "timeout_error"
        server.wait_until(lambda: len(engine.cancelled) == 2)


def test_a_full_queue_is_said_at_once(lm):
    engine = ScriptedEngine(0.02)
    with running(lm, engine, max_open=3) as server:
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json={"max_tokens": 1000, "n": 2, "stream": True}):
            refused = httpx.post(url, json={"max_tokens": 1, "n": 2})
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"
            assert httpx.post(url, json={"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"a"', b"3", b"\xff\xfe", b'{"prompt": "\xff"}', b"{]",
        b"[" * 100_000, b'{"seed": 1e400}', b'{"temperature": NaN}',
        b'{"seed": ' + b"9" * 5000 + b"}", b'{"\\ud800": 1}', b'{"max_tokens": -0.0}',
        b'{"stop": [null]}', b'{"prompt": [[[]]]}', b'{"prompt": {"a": {"b": []}}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/patches"])
def test_broken_bodies_are_refused(shared, path, content):
    headers = {"Content-Type": "application/json"}
    found = httpx.post(shared.url + path, content=content, headers=headers)
    assert found.status_code == 400
    assert found.json()["error"]["message"]


@pytest.fixture(scope="module")
def shared(lm):
    with running(lm, max_document_bytes=64, max_body=100_000, max_open=10_000) as server:
        yield server


def test_large_bodies_are_refused_before_they_are_read(shared):
    url = f"{shared.url}/v1/completions"
    # A million wrong values are one error.
    body = {"prompt": ["a", *range(10_000)]}
    found = httpx.post(url, json=body)
    assert found.status_code == 400
    assert len(found.content) < 1000
    found = httpx.post(url, json={"prompt": "a" * 100_001})
    assert found.status_code == 413
    assert found.json()["error"]["type"] == "request_too_large"

    def parts():
        for _ in range(20):
            yield b" " * 10_000

    found = httpx.post(url, content=parts(), headers={"Content-Type": "application/json"})
    assert found.status_code == 413


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"POST /v1/completions HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: \xff\r\n\r\n",
    ],
)  # fmt: skip
def test_broken_http_does_no_harm(shared, data):
    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(data)
    found = httpx.post(f"{shared.url}/v1/completions", json={"max_tokens": 2})
    assert found.status_code == 200


def test_no_request_of_the_schema_makes_the_server_fail(lm):
    # Some ask for 100 choices: short ones, so that each is answered within the client's 10 s.
    with running(lm, max_document_bytes=16, max_body=100_000, max_open=10_000) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        failed = []
        for operation in schema.get_all_operations():
            schemathesis_run(operation.ok(), failed)
    assert not failed


def schemathesis_run(operation, failed):
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import GenerationMode

    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(
        max_examples=12, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        deadline=None, derandomize=True, database=None,
    )  # fmt: skip
    def check(case):
        found = case.call()
        if found.status_code >= 500:
            failed.append((case.as_curl_command(), found.status_code))

    check()


@pytest.fixture(scope="module")
def checkpoint(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving") / "tiny"
    lm.save(folder)
    return folder


# Takes seconds, since one of the choices does not end before.
LONG_STREAM = {
    "prompt": "a", "max_tokens": 150, "seed": 28, "n": 2, "stream": True, "logprobs": 0,
}  # fmt: skip


@contextlib.contextmanager
def serving(checkpoint, *options):
    """The command in a process, and the address that it prints."""
    command = [sys.executable, "-m", "bytelm", "serve", str(checkpoint), "--port", "0", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"tiny at (http://\S+) \(Ctrl\+C stops it\)\n", line)
            assert found, (line, process.communicate(timeout=10))
            yield process, found[1]
        finally:
            process.kill()


def without_waiting(said):
    """What a command said, without the explanation that a busy machine has time to print."""
    return said.replace(f"{COMPILING}\n", "")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signals_complete_streams_and_refuse_others(lm, checkpoint, number):
    with serving(checkpoint, "--device", "cpu") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG_STREAM, timeout=30) as found:
            lines = found.iter_lines()
            first = next(lines)
            process.send_signal(number)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            events = sse([first, *lines])
        assert events[-1] == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert {choice["index"] for choice in choices if choice["finish_reason"]} == {0, 1}
        data = bytes(
            byte for one in choices if not one["index"] for byte in one["logprobs"]["bytes"]
        )
        sampling = Sampling(1.0, seed=28)
        assert data == generate(lm.module, b"a", max_bytes=150, sampling=sampling)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, without_waiting(err)) == (0, "", "")


@pytest.mark.slow
def test_streams_that_take_too_long_are_cut_when_the_server_stops(checkpoint):
    with serving(checkpoint, "--grace", "0") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG_STREAM, timeout=30) as found:
            lines = found.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            error = json.loads(sse(lines)[-1])["error"]
        assert error["message"] == "the server is stopping"
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, without_waiting(err)) == (0, "", "")


def test_addresses_that_cannot_be_listened_at():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"cannot listen at 127.0.0.1:\d+: .* --port"):
            listen("127.0.0.1", port)


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="ports cannot be shared")
def test_a_reserved_port_is_for_those_who_share_it():
    with reserved("127.0.0.1", 0) as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as shared:
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind(("127.0.0.1", port))
            shared.listen()
            shared.settimeout(10)
            for _ in range(8):
                with socket.create_connection(("127.0.0.1", port), timeout=10):
                    shared.accept()[0].close()
    listen("127.0.0.1", port).close()


def test_the_command_warns_and_explains(run, checkpoint, monkeypatch):
    import bytelm.serving

    served = []
    monkeypatch.setattr(bytelm.serving, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(bytelm.serving, "listen", lambda host, port: listen("127.0.0.1", 0))
    arguments = ("serve", checkpoint, "--host", "0.0.0.0", "--threads", 1)
    status, out, err = run(*arguments)
    assert status == 0
    assert out.startswith("tiny at http://0.0.0.0:")
    assert "0.0.0.0 can be reached from other computers" in err
    monkeypatch.setenv("BYTELM_API_KEY", "secret")
    status, out, err = run(*arguments, "--name", "mine", "--cors-origin", "https://a.example")
    assert (status, err) == (0, "")
    settings = served[-1][0].state.server.settings
    assert (settings.name, settings.api_keys) == ("mine", ("secret",))
    monkeypatch.setenv("BYTELM_API_KEY", "")
    assert "an API key must not be empty" in run(*arguments)[2]
    monkeypatch.delenv("BYTELM_API_KEY")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, err = run(*arguments)
    assert status == 1
    assert 'serving needs uvicorn: pip install "bytelm[serve]"' in err
