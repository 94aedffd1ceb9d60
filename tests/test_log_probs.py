"""Log-probabilities of bytes, and likelihoods of continuations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import byte_strings, ids_of, lm_models, random_byte_lm
from bytelm import codec
from bytelm.checkpoint import CheckpointConfig
from bytelm.config import FittedNgramConfig, ModelDescription
from bytelm.errors import ConfigError
from bytelm.inference import Session
from bytelm.language_model import LanguageModel
from bytelm.lm import ScorerLM, TokenLM
from bytelm.scoring import NgramScorer
from bytelm.tokens import train_tokenizer

# One per way of finding patches, and one without.
KINDS = ("base", "static", "capped", "reset", "stateful rule", "learned rule", "transformer")
MODELS = {name: make for name, make in lm_models().items() if name in KINDS}
# Long enough for the texts of the properties; another length is set where it matters.
CONTEXT = 200


def language_model(module, context_bytes=CONTEXT):
    # Only the context is read of a description: the module is built.
    description = ModelDescription(
        model=FittedNgramConfig(max_order=1, num_contexts=0), context_bytes=context_bytes
    )
    return LanguageModel(module, CheckpointConfig(**dict(description)))


@pytest.fixture(params=MODELS, scope="module")
def lm(request):
    return language_model(MODELS[request.param]())


def session_log_probs(lm, data):
    """By definition: the logits of a session that is fed byte by byte."""
    ids, session = ids_of(data), Session(lm.module)
    logits = torch.cat([session.feed(one) for one in ids.split(1)]).log_softmax(-1)
    targets = [*ids[1:].tolist(), codec.EOS]
    return np.array([logits[at, target].item() for at, target in enumerate(targets)])


def test_log_probs_are_those_of_a_session(lm):
    @settings(max_examples=8)
    @given(byte_strings)
    def check(data):
        found = lm.log_probs(data, eos=True)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, session_log_probs(lm, data), atol=2e-4)
        np.testing.assert_array_equal(lm.log_probs(data), found[:-1])

    check()


def test_texts_together_have_the_values_of_each_alone(lm):
    texts = [b"", "é, a text".encode(), b"\xff\x00", b"one that is longer, " * 8, b"x"]
    together = lm.log_probs(iter(texts), stride=50)
    assert [len(one) for one in together] == [len(text) for text in texts]
    for one, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(one, lm.log_probs(text, stride=50), atol=2e-4)
    pairs = [(text[: n % 5], text[n % 5 :]) for n, text in enumerate(texts)]
    found = lm.log_likelihood([a for a, _ in pairs], [b for _, b in pairs])
    for (context, continuation), value in zip(pairs, found, strict=True):
        assert value == pytest.approx(lm.log_likelihood(context, continuation), abs=1e-3)


@pytest.mark.parametrize("stride", [None, 7])
@pytest.mark.parametrize("context", [30, 1000])
def test_they_sum_to_bits_per_byte_at_any_length(lm, context, stride):
    lm = LanguageModel(lm.module, lm.config.model_copy(update={"context_bytes": context}))
    text = b"a text that is longer than the context, " * 3
    total = -lm.log_probs(text, stride=stride).sum()
    assert total / math.log(2) / len(text) == pytest.approx(
        lm.bits_per_byte(text, stride=stride), rel=1e-12
    )


def test_the_chain_rule_holds_wherever_a_text_is_cut(lm):
    # Within characters, within patches, and beyond the context.
    text = "naïve café, 日本語 and more ".encode() * 3
    lm = LanguageModel(lm.module, lm.config.model_copy(update={"context_bytes": 40}))
    whole = lm.log_likelihood(b"", text)
    assert whole == pytest.approx(lm.log_probs(text, stride=20).sum(), rel=1e-12)

    @settings(max_examples=12)
    @given(st.integers(0, len(text)), st.integers(0, len(text)))
    def check(one, other):
        begin, end = sorted((one, other))
        a, b, c = text[:begin], text[begin:end], text[end:]
        both = lm.log_likelihood(a, b) + lm.log_likelihood(a + b, c)
        assert lm.log_likelihood(a, b + c) == pytest.approx(both, abs=2e-3)
        assert lm.log_likelihood(b"", a) + lm.log_likelihood(a, b + c) == pytest.approx(
            whole, abs=2e-3
        )

    check()


def test_values_of_a_prefix_are_the_prefix_of_the_values(lm):
    text = b"any text, cut anywhere, " * 5
    lm = LanguageModel(lm.module, lm.config.model_copy(update={"context_bytes": 32}))
    whole = lm.log_probs(text, stride=9)
    for length in (1, 31, 32, 33, 70):
        prefix = lm.log_probs(text[:length], stride=9)
        np.testing.assert_allclose(prefix, whole[:length], atol=2e-4)


def test_contexts_and_continuations_may_be_one_or_several():
    lm = language_model(random_byte_lm())
    one = lm.log_likelihood("the ", "cat")
    assert isinstance(one, float)
    assert lm.log_likelihood("the ", "") == 0.0
    assert lm.log_likelihood("the ", ["cat", b"dog"])[0] == pytest.approx(one, abs=1e-4)
    assert lm.log_likelihood(["the ", "a "], "cat")[0] == pytest.approx(one, abs=1e-4)
    assert lm.log_likelihood(["the "], ["cat"]) == pytest.approx([one], abs=1e-4)
    assert lm.log_likelihood([], "x") == lm.log_likelihood("x", []) == []
    with pytest.raises(ConfigError, match="2 contexts were given for 3 continuations"):
        lm.log_likelihood(["a", "b"], ["c", "d", "e"])
    for wrong in (0, CONTEXT + 1):
        with pytest.raises(ConfigError, match=f"between 1 and {CONTEXT}, not {wrong}"):
            lm.log_likelihood("a", "b", stride=wrong)
        with pytest.raises(ConfigError, match=f"between 1 and {CONTEXT}, not {wrong}"):
            lm.log_probs("a", stride=wrong)


def test_token_models_have_likelihoods_of_continuations_but_none_of_bytes():
    text = b"the cat sat on the mat and the dog sat on the log. " * 4
    tokenizer = train_tokenizer([text], 275)
    module = random_byte_lm(vocab_size=tokenizer.vocab_size).transformer
    lm = language_model(TokenLM(module, tokenizer).eval())
    # The context is tokenised by itself, so this is the sum over the tokens of both.
    whole = lm.log_likelihood("", text[:60])
    assert whole / 60 / math.log(2) == pytest.approx(-lm.bits_per_byte(text[:60]), rel=1e-6)
    ids = [codec.BOS, *tokenizer.encode(codec.encode(b"the ca", bos=False))]
    rest = tokenizer.encode(codec.encode(b"t sat", bos=False)).tolist()
    with torch.no_grad():
        chances = lm.module(torch.tensor([[*ids, *rest]]))[0].log_softmax(-1)
    expected = sum(chances[len(ids) - 1 + i, one].item() for i, one in enumerate(rest))
    assert lm.log_likelihood("the ca", "t sat") == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="use bits_per_byte or log_likelihood"):
        lm.log_probs(text)


def test_scorers_are_refused():
    lm = language_model(ScorerLM(NgramScorer(max_order=1, num_contexts=0)))
    for call in (lambda: lm.log_probs("x"), lambda: lm.log_likelihood("x", "y")):
        with pytest.raises(ConfigError, match="it can patch text, not predict it"):
            call()
