"""Models of this package in the evaluation harness: exact likelihoods, greedy flags, generation."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import byte_strings, random_byte_lm, random_patched
from bytelm.errors import ConfigError
from bytelm.evaluation import harness
from bytelm.evaluation.harness import HarnessLM
from bytelm.evaluation.harness.__main__ import with_local_tasks
from bytelm.inference import Sampling
from bytelm.lm import TokenLM
from bytelm.tokens import train_tokenizer
from test_log_probs import language_model
from test_robustness import bigram_model, bits

TEXT = "Der Käfer saß im Gras. 日本語 \U0001f41c".encode() + b"\xff\x00"


class Asked(NamedTuple):
    """What the adapter reads of the harness's instances."""

    args: tuple[Any, ...]


def token_lm():
    tokenizer = train_tokenizer([TEXT] * 3, 270)
    return TokenLM(random_byte_lm(vocab_size=tokenizer.vocab_size).transformer, tokenizer).eval()


MODELS = {
    "patched": random_patched,
    "byte": lambda: random_byte_lm(window=None),
    "token": token_lm,
}


def adapter(name, **options):
    return HarnessLM(language_model(MODELS[name]()), show_progress=False, **options)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return adapter(request.param)


@pytest.fixture(scope="module")
def patched():
    return adapter("patched")


def score(model, *pairs):
    return model.loglikelihood([Asked(pair) for pair in pairs])


def rolled(model, *texts):
    return model.loglikelihood_rolling([Asked((text,)) for text in texts])


def test_likelihood_is_the_same_wherever_the_text_is_split(patched):
    whole = rolled(patched, TEXT)[0]
    cuts = range(len(TEXT) + 1)
    heads = score(patched, *((b"", TEXT[:cut]) for cut in cuts))
    tails = score(patched, *((TEXT[:cut], TEXT[cut:]) for cut in cuts))
    assert whole == pytest.approx(-patched.lm.bits_per_byte(TEXT) * math.log(2) * len(TEXT))
    for (head, _), (tail, _) in zip(heads, tails, strict=True):
        assert head + tail == pytest.approx(whole, abs=1e-3)
    assert heads[0] == (0.0, True) == tails[-1]


def test_batched_is_alone(model):
    @settings(max_examples=10)
    @given(st.lists(st.tuples(byte_strings, byte_strings), min_size=1, max_size=5))
    def check(pairs):
        together = score(model, *pairs, *pairs[:1])
        for pair, found in zip([*pairs, pairs[0]], together, strict=True):
            [alone] = score(model, pair)
            assert found[0] == pytest.approx(alone[0], abs=1e-3)
            assert found[0] == pytest.approx(model.lm.log_likelihood(*pair), abs=1e-3)

    check()


def test_long_documents_are_measured_to_the_end_with_at_least_half_a_context(patched):
    size = patched.lm.context_bytes
    text = (TEXT * (3 * size // len(TEXT) + 1))[: 2 * size + size // 3]
    nats = -patched.lm.log_probs(text, stride=size // 2)
    assert rolled(patched, text)[0] == pytest.approx(-nats.sum(), rel=1e-5)
    [(tail, _)] = score(patched, (text[:-50], text[-50:]))
    assert tail == pytest.approx(-nats[-50:].sum(), rel=1e-4)


def test_a_greedy_continuation_is_what_the_model_generates(model):
    for prompt in (b"", TEXT[:9]):
        greedy = model.lm.generate(prompt, max_bytes=6)
        if not greedy:  # the model ends the document at once
            continue
        other = bytes([greedy[-1] ^ 1])
        found = score(model, (prompt, greedy), (prompt, greedy[:-1] + other))
        if isinstance(model.lm.module, TokenLM):
            # Tokens of the text, not those that were generated, which may be others.
            assert not found[1][1]
            continue
        assert [is_greedy for _, is_greedy in found] == [True, False]


def test_scores_of_a_bigram_model_are_those_by_hand():
    lm, table = bigram_model()
    greedy_after = table[:, [2, *range(4, 260)]].argmax(1)
    model = HarnessLM(lm, show_progress=False)
    pairs = [(b"a cat", b" sat"), (b"", b"on"), (b"x", b""), ("ä".encode()[:1], "ä".encode()[1:])]
    best = int(greedy_after[4 + ord("q")])
    if best:
        pairs.append((b"q", bytes([best - 1])))
    for (context, rest), (found, is_greedy) in zip(pairs, score(model, *pairs), strict=True):
        assert found == pytest.approx(-bits(table, context, rest) * math.log(2), abs=1e-3)
        ids = [1, *(4 + byte for byte in context + rest)]
        chosen = [(2, *range(4, 260))[greedy_after[one]] for one in ids[len(context) : -1]]
        assert is_greedy == (chosen == ids[len(context) + 1 :])


def test_generation_is_that_of_the_model_with_each_request_its_own_limit_and_stop(model):
    prompts = [TEXT[:12].decode(), "", "some other prompt"]
    plain = model.lm.generate(prompts, max_bytes=12)
    stop = plain[0].decode(errors="replace")[2:3]
    asked = [Asked((prompt, {"until": [], "max_gen_toks": 3})) for prompt in prompts]
    asked.append(Asked((prompts[0], {"until": ["", stop], "max_gen_toks": 2})))
    found = model.generate_until(asked)
    assert found[:3] == [one.decode(errors="replace") for one in plain]
    expected = model.lm.generate(prompts[0], max_bytes=8, stop=[stop])
    assert found[3] == expected.decode(errors="replace")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7}, Sampling(temperature=0.0)),
        ({"temperature": 0.0, "do_sample": True}, Sampling(temperature=0.0)),
        ({}, Sampling(temperature=0.0)),
        ({"do_sample": True, "top_p": 0.9}, Sampling(temperature=1.0, top_p=0.9, seed=5)),
        ({"temperature": 0.5, "top_k": 3}, Sampling(temperature=0.5, top_k=3, seed=5)),
    ],
)
def test_options_of_generation(options, expected):
    from bytelm.evaluation.harness.adapter import _to_request

    request = _to_request("a", {**options, "until": "\n\n"}, 4, seed=5)
    assert request.sampling == expected
    assert (request.stop, request.max_bytes) == ([b"\n\n"], 1024)


def test_unknown_options_are_refused_and_batch_sizes_ignored():
    lm = language_model(random_byte_lm())
    HarnessLM(lm, batch_size=1, max_batch_size=4)
    with pytest.raises(ConfigError, match="no option 'pretrained'"):
        HarnessLM(lm, pretrained="x")


def test_the_harness_knows_the_type():
    from lm_eval.api.registry import get_model

    assert get_model("bytelm") is HarnessLM


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("device", ["cuda:0", None])
def test_the_device_of_the_harness_is_used_where_there_is_one(patched, device, monkeypatch):
    asked = []
    monkeypatch.setattr(harness.adapter, "load", lambda *given: asked.append(given) or patched.lm)
    options = {"batch_size": 1, "device": device}
    made = HarnessLM.create_from_arg_obj({"checkpoint": "model"}, options)
    assert asked == [("model", "auto", "auto")]
    assert made.get_model_info()["checkpoint"] == "model"


def test_the_command_of_the_harness_has_local_tasks():
    for arguments in (["ls"], ["--tasks", "piqa", "--include_path", "mine"]):
        assert with_local_tasks(arguments) == arguments
    *given_, option, folder = with_local_tasks(["--model", "bytelm", "--tasks", "piqa_local"])
    assert given_ == ["--model", "bytelm", "--tasks", "piqa_local"]
    assert option == "--include_path"
    assert (Path(folder) / "piqa_local.yaml").exists()
