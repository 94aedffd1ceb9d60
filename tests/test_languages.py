"""Parallel sentences: reading them, costs and likelihood of each, unevenness across languages."""

import lzma
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import blt_config, lm_models, random_byte_lm, random_patched, random_transformer
from bytelm.accounting import forward_flops
from bytelm.checkpoint import CheckpointConfig
from bytelm.config import ScorerConfig, TransformerConfig
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.language_sections import language_sections
from bytelm.evaluation.languages import (
    SPREADS,
    Languages,
    Measured,
    count_tokens,
    gini,
    max_over_min,
    measure,
    variation,
)
from bytelm.evaluation.parallel import Parallel, read_parallel
from bytelm.language_model import LanguageModel
from bytelm.lm import TokenLM
from bytelm.patching import SpaceRule
from bytelm.storage import to_json
from bytelm.tokens import train_tokenizer

PARALLEL = Parallel(
    {
        "en": [b"the cat sat", b"a dog", b"rain, again and again"],
        "de": ["die Katze saß".encode(), b"ein Hund", "Regen, immer Regen, und während".encode()],
        "ru": ["кошка сидела".encode(), "пёс".encode(), "дождь".encode()],
    }
)
SMALL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}


def test_lines_of_files_are_parallel(tmp_path):
    (tmp_path / "en.txt").write_bytes("one\r\ntwo\u2028lines\n".encode())
    (tmp_path / "de.txt.xz").write_bytes(lzma.compress(b"eins\nzwei"))
    (tmp_path / "LICENSE").write_text("no sentence")
    (tmp_path / "de.txt.xz").rename(tmp_path / "de.txt")  # compression is found by content
    parallel = read_parallel(tmp_path)
    assert parallel.sentences == {
        "de": [b"eins", b"zwei"],
        "en": [b"one", "two\u2028lines".encode()],
    }
    assert len(parallel) == 2
    assert parallel.first(1).sentences == {"de": [b"eins"], "en": [b"one"]}


def test_ids_of_tables_are_parallel_in_any_order(tmp_path):
    (tmp_path / "en.tsv").write_bytes(b"a\tone\nb\ttwo\twith a tab")
    (tmp_path / "fi.tsv").write_bytes(b"b\tkaksi\na\tyksi\n")
    found = read_parallel(tmp_path).sentences
    assert found == {"en": [b"one", b"two\twith a tab"], "fi": [b"yksi", b"kaksi"]}


def test_several_files_of_a_language_are_joined_or_chosen(tmp_path):
    for language, dev, test in (("en", "1\n2", "3"), ("de", "1\n2", "3")):
        (tmp_path / f"{language}.dev").write_text(dev)
        (tmp_path / f"{language}.test").write_text(test)
    assert read_parallel(tmp_path).sentences["de"] == [b"1", b"2", b"3"]
    assert read_parallel(tmp_path / "*.test").sentences["de"] == [b"3"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"en.txt": "a"}, "1 languages"),
        ({}, "0 languages"),
        ({"en.txt": "a\nb", "de.txt": "a"}, "only one of en and de has line 2 of txt"),
        ({"en.dev": "a\nb", "en.test": "c", "de.dev": "a", "de.test": "b\nc"}, "line 2 of"),
        ({"en.dev": "a", "de.test": "a"}, "name the same"),
        ({"en.txt": "a\n\nb", "de.txt": "a\n\nb"}, "line 2 of .* has no sentence"),
        ({"en.tsv": "a", "de.tsv": "a\tb"}, "has no tab"),
        ({"en.tsv": "a\tx", "de.tsv": "b\tx"}, "only one of en and de has a of tsv"),
        ({"en.tsv": "a\tx\na\ty", "de.tsv": "a\tx\na\ty"}, "several sentences of one id"),
    ],
)
def test_what_is_not_parallel_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_parallel(tmp_path)


def language_model(module, **description):
    return LanguageModel(module, CheckpointConfig(context_bytes=200, **description))


def transformer_config(**changes):
    return TransformerConfig(**{**SMALL, "window": 8, **changes})


def byte_model():
    return language_model(random_byte_lm(), model=transformer_config())


def token_model():
    tokenizer = train_tokenizer([b"".join(PARALLEL.sentences["en"]) * 9], 280)
    transformer = random_transformer(vocab_size=tokenizer.vocab_size)
    config = transformer_config(vocab_size=tokenizer.vocab_size)
    return language_model(TokenLM(transformer, tokenizer).eval(), model=config, tokens=True)


def patched_model(**options):
    scorer = (
        {}
        if "rule" in options
        else {"scorer": ScorerConfig(model=transformer_config(num_layers=1, window=6))}
    )
    return language_model(random_patched(**options), model=blt_config(), **scorer)


def flops(config, *lengths):
    return sum(part.total for part in forward_flops(config, *lengths).values())


def test_bytes_and_their_flops_and_bits_are_those_of_each_sentence():
    lm = byte_model()
    found = measure(lm, PARALLEL)
    assert list(found.quantities) == ["bytes", "bits", "FLOPs"]
    for row, sentences in enumerate(PARALLEL.sentences.values()):
        for column, data in enumerate(sentences):
            bits = -lm.log_probs(data).sum() / math.log(2)
            assert found.quantities["bytes"][row, column] == len(data)
            assert found.quantities["bits"][row, column] == pytest.approx(bits, abs=1e-3)
            assert found.quantities["FLOPs"][row, column] == flops(lm.config.model, len(data) + 1)


@pytest.mark.parametrize("options", [{}, {"rule": SpaceRule()}, {"rule": lm_models}])
def test_patches_are_those_of_each_sentence_and_flops_include_the_scorer(options):
    if options.get("rule") is lm_models:
        module = lm_models()["learned rule"]()
        lm = language_model(module, model=blt_config())
    else:
        lm = patched_model(**options)
    found = measure(lm, PARALLEL).quantities
    for row, sentences in enumerate(PARALLEL.sentences.values()):
        for column, data in enumerate(sentences):
            with torch.no_grad():
                ids = torch.tensor([[1, *(byte + 4 for byte in data)]])
                patches = int(lm.module.segment(ids).patches.num_patches)
            expected = flops(lm.config.model, len(data) + 1, patches)
            if lm.config.scorer is not None:
                expected += flops(lm.config.scorer.model, len(data) + 1)
            assert found["patches"][row, column] == patches - 1
            assert found["FLOPs"][row, column] == expected


def test_tokens_are_those_of_each_sentence():
    lm = token_model()
    found = measure(lm, PARALLEL).quantities
    for row, sentences in enumerate(PARALLEL.sentences.values()):
        for column, data in enumerate(sentences):
            ids = np.frombuffer(data, np.uint8).astype(np.int64) + 4
            tokens = lm.module.tokenizer.encode(ids)
            assert found["tokens"][row, column] == len(tokens)
            assert found["FLOPs"][row, column] == flops(lm.config.model, len(tokens) + 1)
            bits = lm.bits_per_byte(data) * len(data)
            assert found["bits"][row, column] == pytest.approx(bits, abs=1e-3)


def test_a_uniform_model_needs_as_many_bits_as_bytes_say():
    lm = byte_model()
    torch.nn.init.zeros_(lm.module.transformer.output.weight)
    result = Languages(measure(lm, PARALLEL), "en", replicates=50)
    for language, sentences in PARALLEL.sentences.items():
        mean = sum(map(len, sentences)) / 3
        assert result.mean("bytes", language).value == pytest.approx(mean)
        assert result.mean("bits", language).value == pytest.approx(mean * math.log2(260))
        bpb = result.mean("bits per byte", language)
        assert bpb == pytest.approx((math.log2(260),) * 3)
        ratio = result.ratio("bits", language)
        assert ratio == pytest.approx(result.ratio("bytes", language))
    assert result.ratio("bits", "en") == (1, 1, 1)
    assert result.spread("bits per byte", "Gini").value == pytest.approx(0, abs=1e-9)


def test_statistics_of_unevenness_by_hand():
    x = np.array([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 4.0]])
    assert max_over_min(x[:2]).tolist() == [6, 1]
    # Deviations -2, -1, 0, 3: their mean square is 14 / 4.
    assert variation(x) == pytest.approx([math.sqrt(3.5) / 3, 0, math.sqrt(3)])
    # Differences of the six pairs: 1 + 2 + 5 + 1 + 4 + 3 = 16, each counted twice.
    assert gini(x) == pytest.approx([2 * 16 / (2 * 16 * 3), 0, 3 / 4])


@given(
    st.lists(st.floats(0.1, 100), min_size=2, max_size=6),
    st.floats(0.1, 10),
    st.randoms(use_true_random=False),
)
def test_unevenness_ignores_scale_and_order(values, factor, random):
    other = [factor * value for value in values]
    random.shuffle(other)
    for name, statistic in SPREADS.items():
        found, same = statistic(np.array([values, other]))
        assert found == pytest.approx(same, abs=1e-9)
        assert found >= (name == "max/min") - 1e-9


def measured(scale=1.0, seed=0):
    generator = np.random.default_rng(seed)
    length = generator.gamma(4, 10, size=(1, 400))
    values = length * np.array([[1.0], [1.5], [2.0]]) * scale
    values = values * generator.uniform(0.9, 1.1, size=values.shape)
    return Measured("m", ("en", "de", "ru"), {"tokens": values})


def test_intervals_are_paired_by_sentence():
    a, b = Languages(measured(), "en"), Languages(measured(scale=2.0), "en")
    # Long sentences are long in every language, so ratios are much surer than means.
    mean, ratio = a.mean("tokens", "ru"), a.ratio("tokens", "ru")
    assert mean.low < mean.value < mean.high
    assert ratio.low < 2 < ratio.high
    assert ratio.margin / ratio.value < mean.margin / mean.value / 4
    # A model that needs twice as many tokens everywhere is as uneven.
    for statistic in SPREADS:
        difference = a.spread_difference(b, "tokens", "tokens", statistic)
        assert difference == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_reference_without_sentences_is_refused():
    with pytest.raises(ConfigError, match="choose --reference from en, de, ru"):
        Languages(measured(), "english")


def test_tokens_of_a_tokenizer_file(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    found = count_tokens(tmp_path / "tokenizer.json", PARALLEL)
    assert found.quantities["tokens"].tolist() == [[3, 2, 5], [3, 2, 7], [2, 1, 1]]
    assert found.quantities["bytes"][0].tolist() == [11, 5, 21]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        count_tokens(tmp_path / "other.json", PARALLEL)


def test_sections_of_models_and_tokenizers_side_by_side(tmp_path):
    counted = Measured(
        "file", ("en", "de", "ru"), {"bytes": np.ones((3, 3)), "tokens": 1 + np.eye(3)}
    )
    measured = [
        measure(patched_model(), PARALLEL, "blt"),
        measure(token_model(), PARALLEL, "bpe"),
        measure(byte_model(), PARALLEL, "byte"),
        counted,
    ]
    results = [Languages(one, "en", replicates=30) for one in measured]
    sections = language_sections(results)
    assert [one.title for one in sections] == [
        *[f"languages: {name}" for name in ("blt", "bpe", "byte", "file")],
        "unevenness across languages",
    ]
    for section in sections:
        assert all(len(row) == len(section.columns) for row in section.rows)
        to_json(section.record)
    assert sections[0].columns[:5] == ("language", "bytes", "ratio", "patches", "ratio")
    assert sections[3].columns == ("language", "bytes", "ratio", "tokens", "ratio")
    found = sections[0].record["languages"]["de"]["patches"]["ratio"]
    assert found == results[0].ratio("patches", "de").record()
    differences = sections[-1].record["differences"]
    assert {(one["model"], one["minus"], one["quantity"]) for one in differences} == {
        ("bpe", "blt", "tokens - patches"),
        ("bpe", "blt", "bits"),
        ("bpe", "blt", "FLOPs"),
        ("byte", "blt", "bytes - patches"),
        ("byte", "blt", "bits"),
        ("byte", "blt", "FLOPs"),
        ("file", "blt", "tokens - patches"),
    }
    sections[-1].figures["languages"](tmp_path / "languages.svg")
    assert "FLOPs per sentence" in (tmp_path / "languages.svg").read_text()
