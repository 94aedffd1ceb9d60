"""The server, seen by clients that behave."""

import asyncio
import codecs
import json
import re
from pathlib import Path

import httpx
import openai
import pytest
import torch

from builders import random_byte_lm
from bytelm import codec
from bytelm.checkpoint import CheckpointConfig
from bytelm.config import TransformerConfig
from bytelm.inference import GREEDY, Generated, Sampling, generate
from bytelm.language_model import LanguageModel
from bytelm.serving import Settings, limits
from bytelm.serving.completions import ChoiceWriter, engine_requests
from bytelm.serving.limits import Gate
from bytelm.serving.schemas import CompletionRequest, PatchesRequest
from serving_clients import running, stream_chunks
from test_tokens import token_model


@pytest.fixture(scope="module")
def server():
    with running(max_document_bytes=512) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(server, prompt, max_bytes, sampling=GREEDY, stop=()):
    lm = server.server.lm
    return generate(lm.module, prompt, max_bytes=max_bytes, sampling=sampling, stop=stop)


def as_bytes(choice) -> bytes:
    return bytes(choice.logprobs.bytes)


def post(server, path="/v1/completions", **body):
    return httpx.post(server.url + path, json=body)


PROMPTS = [b"", b"The cat", b"\xff\x00\xfe NUL", "é日本".encode(), b"\xe6\x97"]
SAMPLINGS = [
    ({"temperature": 0}, GREEDY),
    ({"temperature": 0.7, "seed": 5}, Sampling(0.7, seed=5)),
    ({"top_p": 0.9, "seed": -3}, Sampling(1.0, top_p=0.9, seed=-3)),
    (
        {"seed": 9, "extra_body": {"top_k": 5, "min_p": 0.05}},
        Sampling(1.0, top_k=5, min_p=0.05, seed=9),
    ),
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bytes_are_those_of_generate(server, client, prompt):
    for options, sampling in SAMPLINGS:
        found = client.completions.create(
            model="tiny", prompt=list(prompt), max_tokens=30, logprobs=0, **options
        )
        expected = alone(server, prompt, 30, sampling)
        assert as_bytes(found.choices[0]) == expected
        assert found.choices[0].text == expected.decode("utf-8", "replace")


def test_completion(client, server):
    found = client.completions.create(model="tiny", prompt="Once upon", max_tokens=12, seed=1)
    (choice,) = found.choices
    assert found.object == "text_completion"
    assert found.model == "tiny"
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert "trace" not in choice.model_dump()
    assert found.usage.prompt_tokens == 9
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == 21
    assert choice.text == alone(server, b"Once upon", 12, Sampling(1.0, seed=1)).decode(
        "utf-8", "replace"
    )


def test_max_tokens_is_256_unless_the_document_would_be_too_long(client):
    for size, max_bytes in ((0, 256), (256, 256), (500, 12), (512, 1)):
        (request,) = engine_requests(CompletionRequest(prompt="a" * size), "", 512)
        assert request.max_bytes == max_bytes
    found = client.completions.create(model="tiny", prompt="a", max_tokens=0, echo=True)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("a", "length")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("echo", [False, True])
def test_streams_equal_whole_completions(server, client, prompt, echo):
    options = {
        "model": "tiny", "prompt": list(prompt), "max_tokens": 40, "seed": 3, "n": 2, "echo": echo,
    }  # fmt: skip
    whole = client.completions.create(**options)
    texts = ["", ""]
    finish = [None, None]
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert finish[choice.index] is None
        texts[choice.index] += choice.text
        finish[choice.index] = choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert texts == [choice.text for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]
    if echo:
        assert texts[0].startswith(prompt.decode("utf-8", "replace")[:-1])


def test_choices_have_consecutive_seeds(client, server):
    found = client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=3, seed=7, max_tokens=20, logprobs=0
    )
    assert [choice.index for choice in found.choices] == list(range(6))
    for index, choice in enumerate(found.choices):
        prompt = (b"ab", b"cd")[index // 3]
        assert as_bytes(choice) == alone(server, prompt, 20, Sampling(1.0, seed=7 + index % 3))
    assert found.usage.prompt_tokens == 4


def test_prompts_may_be_lists_of_raw_bytes(client, server):
    found = client.completions.create(
        model="tiny", prompt=[[0, 255], [97]], temperature=0, max_tokens=9, logprobs=0
    )
    assert [as_bytes(c) for c in found.choices] == [
        alone(server, b"\0\xff", 9), alone(server, b"a", 9)
    ]  # fmt: skip


def test_stop_strings_end_completions(client, server):
    whole = alone(server, b"stop", 60)
    at = next(i for i in range(3, len(whole)) if 32 <= whole[i] < 128)
    stop = chr(whole[at])
    expected = alone(server, b"stop", 60, stop=[stop.encode()])
    for given in (stop, [stop, "never in it"]):
        found = client.completions.create(
            model="tiny", prompt="stop", max_tokens=60, temperature=0, stop=given, logprobs=1
        )
        assert found.choices[0].finish_reason == "stop"
        assert as_bytes(found.choices[0]) == expected
        assert found.usage.completion_tokens == len(expected)


def test_logprobs_are_those_of_the_model(client, server):
    lm = server.server.lm
    prompt = b"some text"
    found = client.completions.create(
        model="tiny", prompt=prompt.decode(), max_tokens=24, seed=2, logprobs=3
    )
    (choice,) = found.choices
    data, logprobs = as_bytes(choice), choice.logprobs
    with torch.no_grad():
        logits = lm.module(torch.from_numpy(codec.encode(prompt + data))[None])[0].double()
    # Special ids other than the end of the document are never chosen.
    logits[:, [codec.BOE, codec.BOS, codec.BPE]] = -torch.inf
    log_probs = logits.log_softmax(-1)[len(prompt) : -1]
    ids = [byte + codec.OFFSET for byte in data]
    expected = log_probs[range(len(data)), ids].tolist()
    assert logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert len(logprobs.tokens) == len(logprobs.text_offset) == len(data)
    for byte, name, top in zip(data, logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert name == (chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}")
        assert len(top) == 3
        assert list(top.values()) == sorted(top.values(), reverse=True)
    # The offset of a byte is where its character is in the text.
    decoder, offset = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for byte, found_offset in zip(data, logprobs.text_offset, strict=True):
        assert found_offset == offset
        offset += len(decoder.decode(bytes([byte])))


def test_echoed_prompts_have_logprobs_too(client, server):
    """Evaluation harnesses ask so for the likelihood of a text."""
    prompt = "so wie é 日".encode()
    options = {"model": "tiny", "prompt": [list(prompt), "b"], "echo": True, "logprobs": 2}
    found = client.completions.create(**options, max_tokens=0)
    whole = client.completions.create(**options, max_tokens=5, seed=1)
    for choice, text in zip(found.choices, (prompt, b"b"), strict=True):
        assert as_bytes(choice) == text
        assert choice.text == text.decode()
        assert choice.logprobs.text_offset == [
            len(text[:at].decode("utf-8", "ignore")) for at in range(len(text))
        ]
        continued = whole.choices[choice.index].logprobs
        assert continued.token_logprobs[: len(text)] == choice.logprobs.token_logprobs
        assert continued.top_logprobs[: len(text)] == choice.logprobs.top_logprobs
        assert len(continued.text_offset) == len(text) + 5
    # What the model generates has the log-probabilities that it has as a prompt.
    generated = client.completions.create(
        model="tiny", prompt=list(prompt), max_tokens=8, seed=4, logprobs=3
    ).choices[0]
    text = prompt + as_bytes(generated)
    echoed = client.completions.create(
        model="tiny", prompt=list(text), max_tokens=0, echo=True, logprobs=3
    ).choices[0]
    own = generated.logprobs.token_logprobs
    assert echoed.logprobs.token_logprobs[len(prompt) :] == pytest.approx(own, abs=1e-4)
    for one, other in zip(
        echoed.logprobs.top_logprobs[len(prompt) :], generated.logprobs.top_logprobs, strict=True
    ):
        assert one == pytest.approx(other, abs=1e-4)


def test_traces_say_what_the_rule_saw(server):
    prompt = b"trace me"
    found = post(server, prompt=prompt.decode(), max_tokens=30, seed=4, extra=None, trace=True)
    assert found.status_code == 400  # `extra` is unknown
    found = post(server, prompt=prompt.decode(), max_tokens=30, seed=4, trace=True).json()
    trace = found["choices"][0]["trace"]
    data = prompt + bytes(one["byte"] for one in trace)
    patched = server.server.lm.patch(data)
    entropies = [one["entropy"] for one in trace]
    assert entropies == pytest.approx(list(patched.entropies[len(prompt) : -1]), abs=1e-4)
    begins = [len(prompt) + i for i, one in enumerate(trace) if one["begins_patch"]]
    assert begins == [at for at in patched.boundaries if at >= len(prompt)]
    chunks, done = stream_chunks(
        server.url, prompt=prompt.decode(), max_tokens=30, seed=4, trace=True
    )
    assert done
    assert [one for chunk in chunks for one in chunk["choices"][0]["trace"]] == trace


def test_characters_are_never_cut():
    """Whatever the parts in which the engine yields bytes."""
    text = "aé日本🙂\N{COMBINING ACUTE ACCENT}z" * 3
    data = text.encode()
    for size in (1, 2, 3, 5):
        writer = ChoiceWriter(0, b"", CompletionRequest())
        parts = [data[at : at + size] for at in range(0, len(data), size)]
        pieces = [writer.begin()["text"]]
        for number, part in enumerate(parts):
            finish = "length" if number == len(parts) - 1 else None
            pieces.append(writer.add(Generated(part, finish))["text"])
        assert "".join(pieces) == text
    writer = ChoiceWriter(0, "é".encode()[:1], CompletionRequest(echo=True))
    assert writer.begin()["text"] == ""
    assert writer.add(Generated("é".encode()[1:], "end"))["text"] == "é"
    writer = ChoiceWriter(0, b"", CompletionRequest())
    assert writer.add(Generated(b"a\xe6\x97", "length"))["text"] == "a\ufffd"


def test_models(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "bytelm")
    assert model.max_document_bytes == 512
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as caught:
        client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"


def test_patches(server):
    lm = server.server.lm
    text = "Daenerys Targaryen is in Game of Thrones, é"
    expected = lm.patch(text)
    found = post(server, "/v1/patches", text=text).json()
    assert bytes(found["bytes"]) == text.encode()
    assert found["entropies"] == pytest.approx(list(expected.entropies))
    assert [(one["begin"], one["end"]) for one in found["patches"]] == expected.spans
    assert found["global_steps"] == len(expected.boundaries)
    assert found["threshold"] == pytest.approx(lm.config.patching.threshold)
    assert found["flops_per_byte"] > 0
    static = post(server, "/v1/patches", text=list(b"\xff\x00abcd"), rule="static", length=3)
    spans = [(one["begin"], one["end"]) for one in static.json()["patches"]]
    assert spans == lm.patch(b"\xff\x00abcd", "static", length=3).spans
    assert static.json()["flops_per_byte"] < found["flops_per_byte"]
    more = post(server, "/v1/patches", text=text, threshold=-1.0).json()
    assert more["global_steps"] == len(text.encode())
    assert more["flops_per_byte"] > found["flops_per_byte"]
    empty = post(server, "/v1/patches", text="").json()
    assert (empty["patches"], empty["flops_per_byte"]) == ([], None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": "a", "rule": "nothing"}, "unknown patching rule 'nothing'"),
        ({"text": "a", "rule": "space", "threshold": 1.0}, "the space rule has no threshold"),
        ({"text": "a" * 513}, "over the limit of 512"),
        ({"text": [256]}, "from 0 to 255"),
        ({}, "text: Field required"),
    ],
)
def test_wrong_requests_for_patches(server, body, message):
    found = post(server, "/v1/patches", **body)
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


def test_models_without_patches_are_served_too():
    module = random_byte_lm()
    config = TransformerConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=48, window=8)
    lm = LanguageModel(module, CheckpointConfig(model=config))
    with running(lm) as server:
        found = post(server, prompt="ab", max_tokens=10, temperature=0, trace=True, logprobs=0)
        (choice,) = found.json()["choices"]
        assert bytes(choice["logprobs"]["bytes"]) == alone(server, b"ab", 10)
        assert choice["trace"][0]["begins_patch"] is None
        found = post(server, "/v1/patches", text="some text", rule="space").json()
        assert found["global_steps"] is None
        assert found["flops_per_byte"] > 0
        assert post(server, "/v1/patches", text="some text").status_code == 400


def test_token_models_are_served_too():
    module = token_model().eval()
    model = TransformerConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=48, vocab_size=300)
    config = CheckpointConfig(model=model, tokens=True)
    with running(LanguageModel(module, config)) as server:
        body = {"prompt": "a cat", "max_tokens": 30, "seed": 1, "logprobs": 1, "echo": True}
        found = post(server, **body, trace=True).json()
        (choice,) = found["choices"]
        data = bytes(choice["logprobs"]["bytes"])
        expected = alone(server, b"a cat", 30, Sampling(1.0, seed=1))
        assert data[:5] == b"a cat"
        assert data[5:].startswith(expected)  # the last token may be cut
        assert bytes(one["byte"] for one in choice["trace"]) == data[5:]
        assert choice["text"] == (b"a cat" + expected).decode("utf-8", "replace")
        assert len(choice["logprobs"]["tokens"]) < len(data)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"max_bytes": 3}, "max_bytes", "unknown field 'max_bytes'"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 3}, None, "best_of must equal n"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 100, "prompt": ["a", "b"]}, "n", "at most 128"),
        ({"prompt": [1, -1]}, "prompt", "from 0 to 255"),
        ({"prompt": [1, "a"]}, "prompt", "from 0 to 255"),
        ({"prompt": [True]}, "prompt", "from 0 to 255"),
        ({"prompt": ["a", 3]}, "prompt", "must be text, or"),
        ({"prompt": {}}, "prompt", "must be text, or"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stream_options": {}}, None, "need stream=true"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "a" * 600}, None, "over the limit of 512"),
        ({"prompt": "a", "max_tokens": 10**30}, None, "over the limit of 512"),
    ],
)
def test_wrong_requests_are_explained(server, body, param, message):
    found = post(server, **body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    if param:
        assert error["param"].startswith(param)


def test_fields_without_effect_are_accepted(server):
    found = post(
        server, prompt="a", max_tokens=3, user="me", best_of=1, suffix=None, logit_bias={},
        presence_penalty=0, frequency_penalty=0.0, stream=False, logprobs=None, stop=None,
    )  # fmt: skip
    assert found.status_code == 200, found.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/nothing", 404),
    ],
)
def test_unknown_paths_and_methods(server, method, path, status):
    found = httpx.request(method, server.url + path)
    assert found.status_code == status
    assert path in found.json()["error"]["message"]


def test_keys():
    with running(api_keys=("first", "sécond")) as server:

        def get(path="/v1/models", **headers):
            return httpx.get(server.url + path, headers=headers)

        for path in ("/v1/models", "/metrics", "/v1/nothing"):
            found = get(path)
            assert found.status_code == 401
            assert found.json()["error"]["code"] == "invalid_api_key"
            assert found.headers["WWW-Authenticate"] == "Bearer"
        assert get("/health").status_code == 200
        for wrong in ("Bearer wrong", "Bearer", "first", "Basic first", "Bearer first2"):
            assert get(Authorization=wrong).status_code == 401
        assert get(Authorization="Bearer first").status_code == 200
        assert get(Authorization="bearer sécond".encode()).status_code == 200
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="the API key is wrong"),
        ):
            client.completions.create(model="tiny", prompt="a")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="first") as client:
            assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices


def test_rates_are_limited_by_key():
    with running(rate_limit=2.0, api_keys=("a", "b")) as server:

        def get(key):
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.get(f"{server.url}/v1/models", headers=headers)

        assert [get("a").status_code for _ in range(3)] == [200, 200, 429]
        refused = get("a")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["Retry-After"]) <= 30
        assert get("b").status_code == 200
        # Guessing keys is limited too.
        assert [get(f"wrong {i}").status_code for i in range(3)] == [401, 401, 429]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_buckets_fill_again_and_are_forgotten(monkeypatch):
    monkeypatch.setattr(limits, "MAX_CLIENTS", 3)
    limiter = limits.RateLimiter(60.0)
    assert [limiter.take("a", now=0.0) for _ in range(61)] == [0.0] * 60 + [1.0]
    assert limiter.take("a", now=0.5) == pytest.approx(0.5)
    assert limiter.take("a", now=1.0) == 0
    for number in range(10):
        limiter.take(f"client {number}", now=100.0)
        assert len(limiter._buckets) <= 3


def test_pages_of_other_origins_may_use_the_server_only_if_allowed(server):
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    url = "/v1/completions"
    assert (
        "access-control-allow-origin"
        not in httpx.options(server.url + url, headers=headers).headers
    )
    # A page may send plain text without asking, so it must not be read as JSON.
    plain = httpx.post(
        server.url + url, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 400
    with running(cors_origins=("https://a.example",), api_keys=("k",)) as other:
        found = httpx.options(other.url + url, headers=headers)
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        refused = httpx.post(other.url + url, headers={"Origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"


PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


def test_the_examples_of_the_page_work(capsys):
    with running(name="blt") as server:

        def here(text):
            return text.replace("http://127.0.0.1:8000", server.url)

        (code,) = re.findall("```python\n(.*?)```", PAGE, re.DOTALL)
        names: dict = {}
        exec(here(code), names)
        names["client"].close()
        assert "'begins_patch':" in capsys.readouterr().out
        requests = re.findall(r"curl (\S+) .*\n  -d '(.*)'", PAGE)
        assert len(requests) == 2
        for url, body in requests:
            found = httpx.post(here(url), json=json.loads(body))
            assert found.status_code == 200, found.text


def test_the_page_names_every_option_field_and_metric(run, server):
    options = re.findall(r"--[a-z-]+", " ".join(run("serve", "--help")[1].split()))
    fields = {*CompletionRequest.model_fields, *PatchesRequest.model_fields} - {"model"}
    metrics = re.findall(
        r"# TYPE (bytelm_\w+?)(?:_created)? ", server.server.metrics.text().decode()
    )
    for name in {*options, *fields} - {"--help"}:
        assert name.removesuffix("-") in PAGE, name
    for name in metrics:
        assert name in PAGE, name


def test_requests_that_come_at_once_begin_a_few_in_each_turn():
    """So a request for the server's health waits for some of them, not for all."""
    begun = []

    async def app(scope, receive, send):
        begun.append(scope["path"])

    async def no_body():
        return {"type": "http.request", "body": b""}

    async def run():
        gate = Gate(app, Settings(name="tiny"))
        scopes = [{"type": "http", "path": path, "headers": []} for path in ("/v1/x", "/health")]
        many = [asyncio.ensure_future(gate(scopes[0], no_body, None)) for _ in range(100)]
        await asyncio.sleep(0)
        await gate(scopes[1], no_body, None)
        await asyncio.gather(*many)

    asyncio.run(run())
    assert begun.index("/health") == limits.MAX_STARTS
    assert len(begun) == 101


def test_metrics(server):
    generated = post(server, prompt="abc", max_tokens=5, seed=1).json()["usage"][
        "completion_tokens"
    ]
    httpx.get(f"{server.url}/made/up")
    text = httpx.get(f"{server.url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    labels = 'method="POST",path="/v1/completions",status="200"'
    assert float(values[f"bytelm_http_requests_total{{{labels}}}"]) >= 1
    assert 'bytelm_http_requests_total{method="GET",path="other",status="404"}' in values
    assert float(values["bytelm_bytes_generated_total"]) >= generated
    assert float(values["bytelm_requests_decoding"]) == 0
    assert float(values["bytelm_step_seconds_count"]) >= 1
    assert float(values["bytelm_time_to_first_byte_seconds_count"]) >= 1


def test_the_schema_has_every_endpoint(server):
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/completions", "/v1/models", "/v1/models/{name}", "/v1/patches", "/health", "/metrics",
    }  # fmt: skip
    assert json.dumps(schema["components"]["schemas"]["CompletionRequest"]["properties"]["stop"])
