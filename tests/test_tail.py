"""Bits per byte of words by frequency, and of characters by frequency and script."""

import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import byte_strings, lm_models, random_byte_lm, random_patched, random_transformer
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.tail import (
    BANDS,
    Frequencies,
    characters,
    cumulative_bits,
    measure_characters,
    measure_words,
    script,
    tail_section,
    words,
)
from bytelm.lm import TokenLM
from bytelm.storage import to_json
from bytelm.tokens import train_tokenizer
from test_log_probs import language_model

TEXTS = [b"the cat sat, the 'dog' sat", "ёж и the кот".encode(), b"a-cat\xff and  a rat"]


def token_model():
    tokenizer = train_tokenizer([b" the cat sat-cat-cat-cat-cat"] * 9, 266)
    transformer = random_transformer(vocab_size=tokenizer.vocab_size)
    return language_model(TokenLM(transformer, tokenizer).eval())


def test_words_are_runs_of_letters_with_the_space_before_them():
    data = "The  cat's हिन्दी, x1y\xa0z".encode() + b"\xffq"
    found = [(data[one.begin : one.end].decode(), one.key) for one in words(data)]
    assert found == [
        ("The", "the"),
        (" cat", "cat"),
        ("s", "s"),
        (" हिन्दी", "हिन्दी"),
        (" x", "x"),
        ("y", "y"),
        ("z", "z"),
        ("q", "q"),
    ]


@given(byte_strings)
def test_pieces_are_in_order_and_hold_their_key(data):
    end = 0
    for piece in words(data):
        assert end <= piece.begin < piece.end
        end = piece.end
        text = data[piece.begin : piece.end].decode("utf-8", "surrogateescape")
        assert text.removeprefix(" ").casefold() == piece.key
        assert all(unicodedata.category(one)[0] in "LM" for one in text.removeprefix(" "))
    valid = data.decode("utf-8", "ignore")
    assert b"".join(data[one.begin : one.end] for one in characters(data)) == valid.encode()
    assert "".join(one.key for one in characters(data)) == valid


def test_bands_of_frequency():
    frequencies = Frequencies([b"a " * 999 + b"b", b"A c"])
    assert frequencies.total == 1002
    assert frequencies.per_million("a") == pytest.approx(1e6 * 1000 / 1002)
    assert [frequencies.band(one) for one in "abd"] == [BANDS[5], BANDS[4], BANDS[0]]
    frequencies.counts.update({"rare": 1, "c": 2, "d": 20})
    frequencies.total = 2_000_000
    assert [frequencies.band(one) for one in ("rare", "c", "d")] == [*BANDS[1:3], BANDS[3]]
    assert Frequencies([]).band("a") == "unseen"


def test_scripts():
    assert [script(one) for one in "aé中ねж한ก̀7 \n.\ue000"] == [
        *["LATIN", "LATIN", "CJK", "HIRAGANA", "CYRILLIC", "HANGUL", "THAI", "COMBINING"],
        *["digits", "white space", "white space", "other", "other"],
    ]


@pytest.mark.parametrize("name", ["base", "stateful rule", "transformer"])
def test_the_bits_of_words_and_characters_are_those_of_their_bytes(name):
    lm = language_model(lm_models()[name]())
    by_word = measure_words({"m": lm}, TEXTS)
    by_character = measure_characters({"m": lm}, TEXTS)
    bits = [-values / math.log(2) for values in lm.log_probs(TEXTS)]
    assert by_word.left_out == by_character.left_out == 0
    for tail, split in ((by_word, words), (by_character, characters)):
        pieces = [list(split(data)) for data in TEXTS]
        for row, some in enumerate(pieces):
            expected = sum(float(bits[row][one.begin : one.end].sum()) for one in some)
            assert tail.bits[0, row].sum() == pytest.approx(expected, abs=1e-3)
            assert tail.num_bytes[row].sum() == sum(one.end - one.begin for one in some)
        assert sum(tail.counts) == sum(map(len, pieces))


def test_words_of_a_token_model_begin_and_end_with_tokens():
    lm = token_model()
    (cumulative,) = cumulative_bits(lm, [b"the cat, dog"])
    tokens = lm.module.tokenizer.encode(np.frombuffer(b"the cat, dog", np.uint8) + np.int64(4))
    ends = np.cumsum(lm.module.tokenizer.num_ids(tokens))
    assert (~np.isnan(cumulative)).nonzero()[0].tolist() == [0, *ends.tolist()]
    assert cumulative[-1] == pytest.approx(12 * lm.bits_per_byte(b"the cat, dog"), abs=1e-3)
    # "(cat" is one token that begins before its word; " dog" is several, and ends with one.
    tokenizer = train_tokenizer([b"x(cat(cat" * 9], 263)
    transformer = random_transformer(vocab_size=tokenizer.vocab_size)
    lm = language_model(TokenLM(transformer, tokenizer).eval())
    found = measure_words({"m": lm}, [b"(cat dog"])
    assert (found.left_out, found.counts, found.num_bytes.tolist()) == (1, (1,), [[4]])


def test_models_are_compared_on_the_words_that_all_can_measure():
    byte, token = language_model(random_byte_lm()), token_model()
    alone = measure_words({"byte": byte}, TEXTS)
    both = measure_words({"byte": byte, "token": token}, TEXTS)
    assert both.left_out > 0
    assert both.left_out + sum(both.counts) == sum(alone.counts)
    for group in both.groups:
        byte_bpb = both.bits_per_byte("byte", group).value
        token_bpb = both.bits_per_byte("token", group).value
        difference = both.bits_per_byte("token", group, minus="byte").value
        assert difference == pytest.approx(token_bpb - byte_bpb)


def test_a_section_shows_the_first_model_and_differences_from_it():
    models = {"byte": language_model(random_byte_lm()), "token": token_model()}
    found = measure_words(models, TEXTS)
    section = tail_section(found, "words", ", by frequency")
    assert section.columns == ("group", "count", "of bytes", "byte", "token", "token - byte")
    assert [row[1] for row in section.rows] == list(found.counts)
    share = found.left_out / (found.left_out + sum(found.counts))
    assert f"; {share:.1%} are left out" in section.note
    group = found.groups[0]
    record = section.record["groups"][group]
    assert record["minus_first"]["token"] == found.bits_per_byte("token", group, "byte").record()
    to_json(section.record)


def test_a_uniform_model_is_as_bad_at_everything():
    module = random_byte_lm()
    torch.nn.init.zeros_(module.transformer.output.weight)
    lm = language_model(module)
    reference = Frequencies([b"the the the cat"])
    tails = [
        measure_words({"m": lm}, TEXTS, reference),
        measure_characters({"m": lm}, TEXTS),
        measure_characters({"m": lm}, TEXTS, by_script=True),
    ]
    assert tails[0].groups == (BANDS[0], BANDS[5])
    assert tails[0].counts == (10, 5)
    assert {"LATIN", "CYRILLIC", "white space", "other"} == set(tails[2].groups)
    for tail in tails:
        for group in tail.groups:
            found = tail.bits_per_byte("m", group, replicates=20)
            assert found.value == pytest.approx(math.log2(260), abs=1e-4)
            # Latin letters are in several documents, Cyrillic ones in one.
            if not math.isnan(found.low):
                assert found[1:] == pytest.approx((math.log2(260),) * 2, abs=1e-4)
    assert math.isnan(tails[2].bits_per_byte("m", "CYRILLIC").low)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="t reads tokens"):
        measure_characters({"t": token_model()}, TEXTS)
    lm = language_model(random_patched())
    with pytest.raises(DataError, match="give more text"):
        measure_words({"m": lm}, [b"123 ..."])


@given(st.lists(st.text(max_size=8).map(str.encode), max_size=5))
def test_every_word_has_a_band_and_those_of_the_text_are_not_unseen(documents):
    frequencies = Frequencies(documents)
    assert all(
        frequencies.band(piece.key) != "unseen" for data in documents for piece in words(data)
    )
