"""Replicas on Ray Serve: one address, the bytes of one server, and a graceful end."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch

from bytelm.checkpoint import save_model
from bytelm.errors import ConfigError
from bytelm.inference import GREEDY, Sampling, generate
from bytelm.language_model import load
from bytelm.serving import Settings, replicas
from bytelm.serving.replicas import Counted, ReplicaOptions, Traffic, ranked, resources
from serving_clients import gather, stream_chunks, tiny_lm

START_SECONDS = 180


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    lm = tiny_lm()
    save_model(folder, lm.module, lm.config)
    return folder


class Deployed:
    """A command that serves replicas."""

    def __init__(self, process, url):
        self.process, self.url = process, url
        self.was_hurt = False
        """Whether the log says that a replica ended."""
        self.everyone = psutil.Process(process.pid).children(recursive=True)

    def replicas(self):
        """Process ids of the replicas."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [one.pid for one in found if "ServeReplica" in " ".join(one.cmdline())]

    def complete(self, session=None, **body):
        headers = {} if session is None else {"X-Session-Id": session}
        url = f"{self.url}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=60)

    def metric(self, name, session):
        """A metric of the replica that has a session."""
        headers = {"X-Session-Id": session}
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=60).text
        found = re.search(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])


def unexpected(errors):
    """What was logged, without Ray's remarks that a busy machine starts replicas slowly."""
    slow = re.compile(r"readiness check|reported not ready|taken more than 30s|slow __init__")
    return [line for line in errors.splitlines() if line.strip() and not slow.search(line)]


@contextlib.contextmanager
def deployed(checkpoint, *options, number=signal.SIGTERM):
    """Serve replicas; a signal must end the command and all of its processes, without a word."""
    command = [sys.executable, "-m", "bytelm", "serve", str(checkpoint), "--ray", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    with subprocess.Popen(
        [*command, *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, process.stderr.read()
            watchdog.cancel()
            server = Deployed(process, found[0])
            yield server
            if number == signal.SIGINT:
                # As a terminal does: to all processes of the command.
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
            assert server.was_hurt or not unexpected(errors)
            assert not psutil.wait_procs(server.everyone, timeout=20)[1]
        finally:
            watchdog.cancel()
            process.kill()


def test_options_that_need_ray_or_exclude_it(run, checkpoint, monkeypatch):
    code, _, err = run("serve", checkpoint, "--replicas", 2)
    assert (code, err) == (1, "error: --replicas needs --ray: without it there is one process\n")
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    code, _, err = run("serve", checkpoint, "--ray", "--port", 0)
    assert code == 1
    assert "choose a port, or unset RAY_ADDRESS" in err


def test_the_extra_is_named_if_it_is_missing(run, checkpoint, monkeypatch):
    monkeypatch.delitem(sys.modules, "bytelm.serving.replicas")
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("serve", checkpoint, "--ray")
    assert (code, err) == (1, "error: --ray needs ray: pip install 'bytelm[ray]'\n")


def test_wrong_checkpoints_and_addresses_are_refused_before_ray_starts(
    run, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("ray.init", lambda *a, **k: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, err = run("serve", tmp_path / "none", "--ray")
    assert code == 1
    assert str(tmp_path / "none") in err
    code, _, err = run("serve", checkpoint, "--ray", "--host", "203.0.113.1")
    assert code == 1
    assert "cannot listen at 203.0.113.1" in err
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    code, _, err = run("serve", damaged, "--ray", "--port", 0)
    assert code == 1
    assert "model.safetensors is damaged" in err


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Traceback:\nbytelm.errors.ConfigError: too long: choose less\n",
            "^too long: choose less$",
        ),
        ("Traceback:\nValueError: odd\n", "^the replicas cannot start: failed\nTraceback:\nValue"),
    ],
)
def test_replicas_that_cannot_start_say_why(monkeypatch, message, reason):
    def fail(*arguments, **options):
        raise RuntimeError("failed")

    deployment = SimpleNamespace(message=message)
    application = SimpleNamespace(deployments={"bytelm": deployment})
    status = SimpleNamespace(applications={"bytelm": application})
    monkeypatch.setattr("ray.serve.start", lambda **options: None)
    monkeypatch.setattr("ray.serve.run", fail)
    monkeypatch.setattr("ray.serve.status", lambda: status)
    with pytest.raises(ConfigError, match=reason):
        replicas._deploy(replicas.application(Path("x"), Settings(), ReplicaOptions(), 1, 0), "", 1)


def node(alive=True, **found):
    return {"Alive": alive, "Resources": {name: float(found[name]) for name in found}}


def test_replicas_share_the_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one, two = [node(CPU=8)], [node(CPU=8), node(CPU=4), node(False, CPU=1), node(memory=1)]
    assert resources(ReplicaOptions(1), one) == (8, 0)
    assert resources(ReplicaOptions(3), one) == (2, 0)
    assert resources(ReplicaOptions(3, threads=1), one) == (1, 0)
    assert resources(ReplicaOptions(4), two) == (2, 0)
    assert resources(ReplicaOptions(2, device="cpu"), [node(CPU=8, GPU=1)]) == (4, 0)
    assert resources(ReplicaOptions(2), [node(CPU=8, GPU=2)]) == (1, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert resources(ReplicaOptions(2), one) == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReplicaOptions(3, threads=3), "room for 2 replicas of 3, which take 3 processors each"),
        (ReplicaOptions(1, device="cuda"), "room for 0 replicas of 1, which take .* and a GPU"),
    ],
)
def test_too_few_processors_and_gpus_are_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        resources(options, [node(CPU=8)])


def test_only_the_sessions_of_a_replica_that_ends_move():
    replicas = ["a", "b", "c", "d"]
    homes = {str(n): ranked(str(n), replicas)[0] for n in range(400)}
    for replica in replicas:
        assert 60 < list(homes.values()).count(replica) < 140
    for session, home in homes.items():
        left = ranked(session, replicas[1:])
        assert home in (left[0], "a")


def test_requests_are_refused_while_those_in_progress_are_completed():
    traffic = Traffic("one")

    async def app(scope, receive, send):
        assert traffic.num_open == 1
        traffic.is_stopping = True
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    gather(Counted(app, traffic)({"type": "http"}, None, send))
    assert traffic.num_open == 0
    gather(Counted(app, traffic)({"type": "http"}, None, send))
    starts = [one for one in sent if one["type"] == "http.response.start"]
    assert [one["status"] for one in starts] == [200, 503]
    assert all((b"x-replica", b"one") in one["headers"] for one in starts)


@pytest.fixture(scope="module")
def server(checkpoint):
    with deployed(checkpoint, "--replicas", "2", "--max-document-bytes", "4096") as found:
        yield found


PROMPTS = [b"", b"The cat", b"\xff\x00\xfe NUL", "é日本".encode()]


@pytest.mark.slow
def test_two_replicas_answer_with_the_bytes_of_generate(server, checkpoint):
    lm = load(checkpoint, "cpu")

    def check(number):
        prompt = PROMPTS[number % len(PROMPTS)]
        sampling = Sampling(1.0, seed=number)
        expected = generate(lm.module, prompt, max_bytes=40, sampling=sampling)
        body = {"prompt": list(prompt), "max_tokens": 40, "seed": number}
        whole = server.complete(**body, logprobs=0)
        (choice,) = whole.json()["choices"]
        assert bytes(choice["logprobs"]["bytes"]) == expected
        chunks, done = stream_chunks(server.url, **body)
        text = "".join(one["choices"][0]["text"] for one in chunks)
        assert done
        assert text == expected.decode("utf-8", "replace")
        return whole.headers["X-Replica"]

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(check, range(24)))
    assert len(set(names)) == 2


@pytest.mark.slow
def test_a_session_stays_at_its_replica(server):
    homes = set()
    for session in map(str, range(12)):
        found = {
            server.complete(session, prompt="a", max_tokens=1).headers["X-Replica"] for _ in "abc"
        }
        assert len(found) == 1
        homes |= found
    assert len(homes) == 2


LONG = {"prompt": "Once", "max_tokens": 1500, "temperature": 0}
"""A request that takes seconds: the model does not end this document earlier."""


@pytest.mark.slow
def test_a_client_that_disconnects_ends_its_request(server):
    generated = server.metric("bytelm_bytes_generated_total", "s")
    url = f"{server.url}/v1/completions"
    body, headers = {**LONG, "stream": True}, {"X-Session-Id": "s"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as found:
        lines = found.iter_lines()
        next(lines)
        assert server.metric("bytelm_requests_decoding", "s") == 1
    ends = time.monotonic() + 10
    while server.metric("bytelm_requests_decoding", "s"):
        assert time.monotonic() < ends, "the request goes on"
    assert server.metric("bytelm_bytes_generated_total", "s") - generated < LONG["max_tokens"]


@pytest.mark.slow
def test_a_replica_that_was_killed_is_replaced_while_the_other_answers(server):
    def names():
        found = [server.complete(str(n), prompt="a", max_tokens=1) for n in range(12)]
        return {one.headers["X-Replica"] for one in found if one.status_code == 200}

    before = names()
    assert len(before) == 2
    server.was_hurt = True
    os.kill(server.replicas()[0], signal.SIGKILL)
    ends = time.monotonic() + 90
    while len(after := names()) < 2 or after == before:
        assert after, "the address must go on answering"
        assert time.monotonic() < ends
    assert len(after & before) == 1


@pytest.mark.slow
def test_a_signal_ends_the_command_after_the_requests_in_progress(checkpoint):
    ended = []
    with deployed(checkpoint, "--max-document-bytes", "8192", number=signal.SIGINT) as server:
        lm = load(checkpoint, "cpu")
        prompt = LONG["prompt"].encode()
        expected = generate(lm.module, prompt, max_bytes=LONG["max_tokens"], sampling=GREEDY)
        assert len(expected) == LONG["max_tokens"]

        def read():
            chunks, done = stream_chunks(server.url, **LONG)
            text = "".join(one["choices"][0]["text"] for one in chunks)
            ended.append((done, text == expected.decode("utf-8", "replace")))

        reader = threading.Thread(target=read)
        reader.start()
        while not server.metric("bytelm_requests_decoding", "s"):
            assert reader.is_alive()
    reader.join()
    assert ended == [(True, True)]
