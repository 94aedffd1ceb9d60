"""Bits per byte of clean text after noised text."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import byte_strings, ids_of, random_byte_lm, random_patched
from bytelm import codec
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.noise import Noise, parse_noise, parse_noises
from bytelm.evaluation.robustness import (
    cut_pieces,
    measure_robustness,
    num_texts,
    robustness_section,
)
from bytelm.language_model import LanguageModel
from bytelm.lm import TokenLM
from bytelm.tokens import train_tokenizer
from test_log_probs import language_model

TEXTS = [b"the cat sat on the mat, ", "ein Käfer saß im Gras; ".encode(), b"\xff\x00 is no text, "]
DOCUMENTS = [text * (4 + n) for n, text in enumerate(TEXTS)]


@given(st.lists(byte_strings | st.text(max_size=60).map(codec.to_bytes)), st.integers(8, 10))
def test_pieces_follow_each_other_and_split_no_character(documents, size):
    pieces = list(cut_pieces(documents, 3 * size, size))
    for number, data in enumerate(documents):
        own = [p for p in pieces if p.document == number]
        joined = b"".join(p.context + p.continuation for p in own)
        assert data.startswith(joined)
        assert len(data) - len(joined) < size + 4
        assert all(p.context and p.num_bytes <= 4 * size for p in own)
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        assert all(p.context.decode() and p.continuation.decode() is not None for p in own)
    if any(len(data) > size + 3 for data in documents):
        assert pieces


def test_pieces_are_cut_before_white_space_where_it_is_near():
    data = b"one  word after another\n\nand so on, " * 20
    pieces = list(cut_pieces([data], 120, 32))
    assert len(pieces) > 2
    for piece in pieces[:-1]:
        assert piece.continuation[:1].isspace()
        assert not piece.context[-1:].isspace()
        assert not piece.continuation[-1:].isspace()
    # Without white space nearby the sizes are those that are asked for.
    assert [p.num_bytes for p in cut_pieces([b"x" * 304], 120, 32)] == [152, 152]


def bigram_model():
    """A model that sees one byte, and the table of its logarithms of probabilities."""
    module = random_byte_lm(window=1)
    with torch.no_grad():
        table = module(torch.arange(260)[:, None])[:, 0].double().log_softmax(-1).numpy()
    return language_model(module), table


def bits(table, context, text):
    ids = ids_of(context + text).tolist()
    pairs = list(pairwise(ids))
    return -sum(table[pair] for pair in pairs[len(context) :]) / math.log(2)


def test_scores_of_a_bigram_model_by_hand():
    lm, table = bigram_model()
    pieces = list(cut_pieces(DOCUMENTS, 40, 9))
    noise = parse_noise("uppercase+repeat")
    found = measure_robustness(lm, pieces, [noise], seed=3)
    assert (found.num_pieces, found.num_documents) == (len(pieces), 3)
    assert found.num_bytes == sum(len(p.continuation) for p in pieces)
    clean = sum(bits(table, p.context, p.continuation) for p in pieces) / found.num_bytes
    total = sum(p.num_bytes for p in pieces)
    whole = sum(bits(table, b"", p.context + p.continuation) for p in pieces)
    noised = sum(bits(table, noise(p.context, 3), p.continuation) for p in pieces)
    texts = [noise(p.context + p.continuation, 3) for p in pieces]
    size, noised_whole = sum(map(len, texts)), sum(bits(table, b"", text) for text in texts)
    first, second = found.scores
    assert (first.noise, second.noise) == ("clean", "uppercase+repeat")
    assert first.bits_per_byte.value == pytest.approx(clean, rel=1e-5)
    assert first.whole.value == pytest.approx(whole / total, rel=1e-5)
    assert first.change == first.whole_change == (0, 0, 0)
    assert first.length == 1
    assert second.bits_per_byte.value == pytest.approx(noised / found.num_bytes, rel=1e-5)
    assert second.change.value == pytest.approx(noised / found.num_bytes - clean, abs=1e-5)
    assert second.length == pytest.approx(size / total)
    assert second.whole.value == pytest.approx(noised_whole / size, rel=1e-5)
    assert second.whole_per_clean_byte.value == pytest.approx(noised_whole / total, rel=1e-5)
    assert second.whole_change.value == pytest.approx((noised_whole - whole) / total, abs=1e-4)
    # A bigram model sees the last byte of a context only, so little changes, for every draw.
    assert second.change.low < second.change.value < second.change.high
    assert second.change.margin < second.bits_per_byte.margin


MODELS = {
    "patched": random_patched,
    "token": lambda: TokenLM(random_byte_lm().transformer, train_tokenizer(DOCUMENTS, 260)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_of_patches_and_tokens_under_all_noises(make):
    lm, done = language_model(make()), []
    noises, pieces = parse_noises("all"), list(cut_pieces(DOCUMENTS, 30, 9))
    found = measure_robustness(lm, pieces, noises, report=done.append)
    assert [one.noise for one in found.scores] == ["clean", *map(str, noises)]
    assert done[-1] == num_texts(pieces, noises) == 2 * len(pieces) * len(found.scores)
    values = lm.log_likelihood([p.context for p in pieces], [p.continuation for p in pieces])
    clean = -sum(values) / math.log(2) / found.num_bytes
    assert found.scores[0].bits_per_byte.value == pytest.approx(clean, rel=1e-5)
    changes = {one.noise: one.change.value for one in found.scores}
    assert changes["nfc"] == 0.0  # the text is in that form
    assert changes["antspeak"] != 0.0
    flat = [x for one in found.scores for estimate in one[2:] for x in estimate]
    assert np.isfinite(flat).all()


def test_one_document_is_resampled_by_piece():
    lm, _ = bigram_model()
    found = measure_robustness(lm, list(cut_pieces(DOCUMENTS[:1], 10, 9)), [])
    assert found.drawn == "pieces"
    assert found.scores[0].bits_per_byte.margin > 0


def test_two_models_are_compared_in_pairs():
    (lm, _), pieces = bigram_model(), list(cut_pieces(DOCUMENTS, 30, 9))
    drop = parse_noise("drop:0.5")
    found = measure_robustness(lm, pieces, [drop])
    assert found.difference(found, "drop:0.5") == (0, 0, 0)
    other = LanguageModel(random_patched(), lm.config)
    theirs = measure_robustness(other, pieces, [drop, parse_noise("uppercase")])
    difference = theirs.difference(found, "drop:0.5")
    changes = [one.scores[1].change for one in (theirs, found)]
    assert difference.value == pytest.approx(changes[0].value - changes[1].value)
    assert difference.low < difference.value < difference.high
    with pytest.raises(ConfigError, match="not measured with both"):
        found.difference(theirs, "uppercase")
    with pytest.raises(ConfigError, match="different text or seeds"):
        found.difference(measure_robustness(lm, pieces[:-1], [drop]), "drop:0.5")


def test_the_section_has_every_score_and_draws_its_figure(tmp_path):
    lm, _ = bigram_model()
    found = measure_robustness(lm, list(cut_pieces(DOCUMENTS, 30, 9)), parse_noises("drop,nfc"))
    section = robustness_section(found)
    assert [row[0] for row in section.rows] == ["clean", "drop", "nfc"]
    assert all(len(row) == len(section.columns) for row in section.rows)
    record = json.loads(json.dumps(section.record, allow_nan=False))["noises"]
    assert record["drop"]["change"]["value"] == found.scores[1].change.value
    section.figures["noise"](tmp_path / "noise.svg")
    assert "drop" in (tmp_path / "noise.svg").read_text()


def test_mistakes():
    lm, _ = bigram_model()
    with pytest.raises(DataError, match="no document is long enough"):
        measure_robustness(lm, [], [Noise()])
    with pytest.raises(ConfigError, match="at least 8"):
        list(cut_pieces([b"short"], 0))
