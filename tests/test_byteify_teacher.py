"""Distributions of bytes that a token model implies, against sums over the whole vocabulary."""

import math

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.byteify.donor import open_donor
from bytelm.byteify.teacher import (
    END,
    Vocabulary,
    byte_targets,
    donor_targets,
    read_vocabulary,
)
from bytelm.errors import CheckpointError, DataError
from test_byteify import TEXT, save_donor

# Few bytes, the first and the last among them, so that prefixes are shared.
DATA = st.lists(st.sampled_from([0, 97, 98, 255]), min_size=1, max_size=4).map(bytes)


@st.composite
def cases(draw):
    """A vocabulary with special and duplicate tokens, some tokens, and logits."""
    words = draw(st.lists(DATA, min_size=1, max_size=8))
    words += [bytes([byte]) for byte in (0, 97, 98, 255)]
    vocabulary = [b"", *words, b""]
    tokens = draw(st.lists(st.integers(1, len(words)), max_size=4))
    seed = draw(st.integers(0, 99))
    scale = draw(st.sampled_from([1.0, 30.0]))
    logits = np.random.default_rng(seed).normal(0, scale, (len(tokens) + 1, len(vocabulary)))
    return vocabulary, tokens, logits.astype(np.float32)


def reference_targets(vocabulary, ends, tokens, logits):
    """The equations of the module, one token of the vocabulary at a time."""
    following, ending = [], []
    for step in range(len(tokens) + 1):
        weights = [math.exp(float(x) - float(max(logits[step]))) for x in logits[step]]
        end = sum(weights[token] for token in ends)

        def mass(prefix, weights=weights):
            pairs = zip(vocabulary, weights, strict=True)
            return sum(w for data, w in pairs if data and data.startswith(prefix))

        def own(prefix, weights=weights):
            return sum(w for data, w in zip(vocabulary, weights, strict=True) if data == prefix)

        data = vocabulary[tokens[step]] if step < len(tokens) else b""
        for length in range(max(len(data), 1)):
            prefix = data[:length]
            row = [mass(prefix + bytes([byte])) for byte in range(256)]
            row.append(0.0 if prefix else end)
            rest = mass(prefix) - own(prefix) if prefix else mass(b"") + end
            assert sum(row) == pytest.approx(rest, rel=1e-6, abs=1e-9)
            following.append([x / sum(row) for x in row])
        for length in range(1, len(data) + 1):
            ending.append(own(data[:length]) / mass(data[:length]))
    return np.array(following), np.array(ending)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_targets_equal_sums_over_the_vocabulary(case):
    vocabulary, tokens, logits = case
    found = byte_targets(Vocabulary(vocabulary, [0]), tokens, logits)
    following, ending = reference_targets(vocabulary, [0], tokens, logits)
    np.testing.assert_allclose(found.next, following, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(found.ends, ending.reshape(-1), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(found.next.sum(1), 1, rtol=1e-5)


@given(cases(), st.sets(st.integers(0, 16)))
def test_divided_tokens_spell_the_text_and_end_where_they_are_wanted(case, ends):
    words, tokens, _ = case
    vocabulary = Vocabulary(words, [0])
    sizes = [len(words[token]) for token in tokens]
    begins = np.cumsum([0, *sizes]).tolist()
    wanted = {end for end in ends if 0 < end <= begins[-1]}
    found = vocabulary.divide(tokens, sorted(ends))
    assert b"".join(words[one] for one in found) == b"".join(words[one] for one in tokens)
    found_ends = np.cumsum([len(words[one]) for one in found]).tolist()
    assert {*begins[1:], *wanted} <= {*found_ends}
    if wanted <= {*begins}:
        assert found == tokens


def test_parts_of_tokens_are_the_longest_ones():
    vocabulary = Vocabulary([b"", b"a", b"b", b"ab", b"abab", b"ba"], [0])
    assert vocabulary.divide([4, 3], [3]) == [3, 1, 2, 3]
    assert vocabulary.spell(b"babab") == [5, 5, 2]
    with pytest.raises(DataError, match="no token for the byte 0x63"):
        vocabulary.spell(b"abc")


@settings(max_examples=60, deadline=None)
@given(cases())
def test_bytes_and_ends_multiply_to_the_probability_of_the_token(case):
    vocabulary, tokens, logits = case
    found = byte_targets(Vocabulary(vocabulary, [0]), tokens, logits)
    at = 0
    for step, token in enumerate(tokens):
        weights = np.exp(logits[step].astype(np.float64) - logits[step].max())
        twins = [
            w for data, w in zip(vocabulary, weights, strict=True) if data == vocabulary[token]
        ]
        known = weights[:-1].sum()  # without the special token that ends nothing
        product = 1.0
        for offset, byte in enumerate(vocabulary[token]):
            product *= float(found.next[at + offset, byte])
            is_last = offset == len(vocabulary[token]) - 1
            end = float(found.ends[at + offset])
            assert found.is_end[at + offset] == is_last
            product *= end if is_last else 1 - end
        # The factor 1 - end loses digits where a token almost surely ends.
        assert product == pytest.approx(sum(twins) / known, rel=1e-3, abs=1e-6)
        at += len(vocabulary[token])


def test_the_example_of_the_module():
    vocabulary = Vocabulary([b"", b"a", b"an", b"and", b"at"], [0])
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.1, 0.3]] * 2, np.float32))
    found = byte_targets(vocabulary, [2], logits)
    assert found.next[0, ord("a")] == pytest.approx(0.9)
    assert found.next[0, END] == pytest.approx(0.1)
    assert found.next[1, ord("n")] == pytest.approx(0.4 / 0.7)
    assert found.next[1, END] == 0
    assert found.ends.tolist() == pytest.approx([0.2 / 0.9, 0.3 / 0.4])
    assert found.is_end.tolist() == [False, True]
    assert len(found.next) == 3  # the last is of what follows


def test_special_tokens_in_the_text_are_refused():
    with pytest.raises(DataError, match="token 0 has no bytes"):
        byte_targets(Vocabulary([b"", b"a"], [0]), [0], np.zeros((2, 2), np.float32))


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    return open_donor(save_donor(tmp_path_factory.mktemp("donor"), "qwen2"))


def test_a_donor_teaches_the_bytes_of_a_text(donor):
    vocabulary = read_vocabulary(donor)
    text = TEXT[:200] + "é😀"
    found = donor_targets(donor, vocabulary, text)
    data = np.frombuffer(text.encode(), np.uint8)
    assert found.next.shape == (len(data) + 1, 257)
    taken = found.next[np.arange(len(data)), data]
    assert (taken > 0).all()
    # The nats of bytes and ends together are those of the tokens.
    tokens = donor.encode(text)
    ids = torch.tensor([[vocabulary.ends[0], *tokens]])
    logits = donor.model(ids).logits[0, :-1]
    unknown = [not data and at not in vocabulary.ends for at, data in enumerate(vocabulary.tokens)]
    log_probs = logits.masked_fill(torch.tensor(unknown), -torch.inf).log_softmax(-1)
    wanted = -float(log_probs[range(len(tokens)), tokens].sum())
    ends = np.where(found.is_end, found.ends, 1 - found.ends)
    nats = -np.log(taken.astype(float)).sum() - np.log(ends.astype(float)).sum()
    assert nats == pytest.approx(wanted, rel=1e-4)


def test_texts_that_the_tokens_do_not_spell_are_refused(donor):
    vocabulary = read_vocabulary(donor)
    with pytest.raises(DataError, match="do not spell the text"):
        donor_targets(donor, vocabulary, "before <|endoftext|> after")
    short = donor.model.config.max_position_embeddings
    donor.model.config.max_position_embeddings = 4
    with pytest.raises(DataError, match="exceed the donor's 4"):
        donor_targets(donor, vocabulary, TEXT[:200])
    donor.model.config.max_position_embeddings = short


def test_other_tokenizers_are_refused(donor):
    other = tokenizers.Tokenizer(tokenizers.models.BPE({"▁the": 0}, []))
    with pytest.raises(CheckpointError, match="not byte-level"):
        read_vocabulary(donor._replace(tokenizer=other))
