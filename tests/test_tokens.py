"""The tokenizer, and the model of tokens: the same text, the same bytes, another unit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import NGRAMS, random_transformer
from bytelm import codec, cpu, load
from bytelm.checkpoint import load_scorer, save_model
from bytelm.config import ModelDescription, TransformerConfig
from bytelm.data.packing import Row, make_batch
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.inference import generate
from bytelm.likelihood import evaluate, total
from bytelm.lm import ByteLM, TokenLM, kinds
from bytelm.model import transformer
from bytelm.tokens import Tokenizer, load_tokenizer, train_tokenizer
from bytelm.training import position_nats
from bytelm.units import Span, TokenUnits

TEXT = b"the cat sat on the mat, the dog lay on the log; that is 12345 things.\n" * 20
TOKENIZER = train_tokenizer([TEXT, b"caf\xc3\xa9 <eos> special 1 " * 9, b"\xff\xfe"], 300)


def token_model(tokenizer=TOKENIZER, seed=0):
    transformer = random_transformer(
        seed, vocab_size=tokenizer.vocab_size, window=None, hash_embeddings=NGRAMS
    )
    return TokenLM(transformer, tokenizer)


def span(data: bytes, begin=0):
    return Span(0, begin, codec.encode(data, eos=True), None)


@given(st.binary(max_size=200) | st.text(max_size=80).map(codec.to_bytes))
def test_any_bytes_come_back(data):
    ids = codec.encode(data, eos=True)
    tokens = TOKENIZER.encode(ids)
    assert b"".join(TOKENIZER.decode(int(t)) for t in tokens) == data
    assert TOKENIZER.num_ids(tokens).sum() == len(ids)
    assert tokens[0] == codec.BOS
    assert tokens[-1] == codec.EOS


def test_it_merges_what_is_frequent():
    tokens = TOKENIZER.encode(codec.encode(TEXT))
    assert len(tokens) < 0.5 * len(TEXT)
    assert b" the" in {TOKENIZER.decode(int(t)) for t in tokens}


@given(st.binary(max_size=100))
def test_without_merges_it_is_the_byte_codec(data):
    ids = codec.encode(data, eos=True)
    assert np.array_equal(Tokenizer([]).encode(ids), ids)


def test_words_and_numbers_are_split_before_merging():
    tokenizer = train_tokenizer([b"12345 12345 12345 ab,cd ab,cd ab,cd " * 50], 267)
    made = {tokenizer.decode(t) for t in range(codec.VOCAB_SIZE, 267)}
    assert b"123" in made
    assert not any(len(t.strip()) > 3 for t in made if t.strip().isdigit())
    assert not any(b"b,c" in t for t in made)


def test_a_saved_tokenizer_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    assert again.merges == TOKENIZER.merges
    assert again.fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("content", ["", "{}", '{"merges": [["a"]]}', '{"merges": [["ab", "c"]]}'])
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"absent.json is not a tokenizer"):
        load_tokenizer(tmp_path / "absent.json")


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="vocabulary of 259 is too small"):
        train_tokenizer([TEXT], 259)
    with pytest.raises(DataError, match=r"has only .* pairs to merge"):
        train_tokenizer([b"abc"], 1000)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.integers(1, 20))
def test_a_row_predicts_every_byte_once(documents, max_tokens):
    done = []
    for data in documents:
        rest = span(data)
        while len(rest.ids) > 1:
            row = Row(64, max_tokens, TokenUnits(TOKENIZER))
            taken = row.add(rest)
            batch = make_batch([row])
            assert 0 < row.num_units <= max_tokens
            assert batch.ids.shape == (1, max_tokens)
            assert int(batch.byte_counts) == taken
            targets = batch.targets[0, : row.num_units]
            done += [TOKENIZER.decode(int(t)) for t in targets]
            assert int(batch.target_bytes.sum()) == sum(map(len, done[-len(targets) :]))
            # What is read is what was predicted before, after the byte (or BOS) that was known.
            assert batch.ids[0, 0] == rest.ids[0]
            assert torch.equal(batch.ids[0, 1 : row.num_units], targets[:-1])
            rest = rest._replace(begin=rest.begin + taken, ids=rest.ids[taken:])
    assert b"".join(done) == b"".join(documents)


def test_bits_per_byte_are_those_of_the_tokens():
    model, data = token_model(), TEXT[:100]
    tokens = torch.from_numpy(TOKENIZER.encode(codec.encode(data, eos=True)))
    logits = model(tokens[None, :-1])[0].detach()
    nats = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    found = evaluate(model, [("a", data)], context_bytes=512)["a"]
    assert found.nats == pytest.approx(float(nats[:-1].sum()), rel=1e-5)
    assert found.num_bytes == 100
    assert found.num_units == len(tokens) - 1


@given(st.binary(max_size=150), st.integers(1, 16))
def test_every_byte_is_scored_once_whatever_the_stride(data, stride):
    found = total(evaluate(token_model(), [("a", data)], context_bytes=16, stride=stride).values())
    assert found.num_bytes == len(data)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5))
def test_without_merges_the_model_is_the_byte_model(documents):
    model = token_model(Tokenizer([]))
    labelled = [("a", d) for d in documents]
    tokens = total(evaluate(model, labelled, context_bytes=64, stride=16).values())
    plain = total(
        evaluate(ByteLM(model.transformer), labelled, context_bytes=64, stride=16).values()
    )
    assert tokens.nats == pytest.approx(plain.nats, rel=1e-5, abs=1e-6)
    assert tokens.num_bytes == plain.num_bytes


@pytest.mark.parametrize("fuses", [False, True])
def test_a_large_vocabulary_gives_the_loss_and_gradients_of_all_logits(monkeypatch, fuses):
    monkeypatch.setattr(transformer, "CHUNK_LOGITS", 1)
    row = Row(200, 40, TokenUnits(TOKENIZER))
    for data in (TEXT[:90], TEXT[30:70]):
        row.add(span(data))
    batch = make_batch([row, row])
    results = []
    for vocabulary in (10**9, 1):
        monkeypatch.setattr(kinds, "CHUNKED_VOCAB", vocabulary)
        model = token_model()
        assert model.takes_targets == (vocabulary == 1)
        if fuses:
            cpu.fuse(model.trained)
        nats = position_nats(model, batch)
        (nats.sum() / 50).backward()
        results.append([nats, *(one.grad for one in model.parameters())])
        assert nats.shape == batch.targets.shape
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * float(b.detach().abs().max()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", [b"", b"the cat sat on", b"\xff\x00"])
def test_generation_is_that_of_full_forwards(prompt, seed):
    model = token_model(seed=seed)
    ids = torch.from_numpy(TOKENIZER.encode(codec.encode(prompt)))
    expected = b""
    while len(expected) < 30:
        logits = model(ids[None])[0, -1].detach()
        logits[[codec.BOE, codec.BOS, codec.BPE]] = float("-inf")
        chosen = int(logits.argmax())
        if chosen == codec.EOS:
            break
        expected += TOKENIZER.decode(chosen)
        ids = torch.cat((ids, ids.new_tensor([chosen])))
    assert generate(model, prompt, max_bytes=30) == expected[:30]
    if len(expected) > 9:
        cut = expected[5:8]
        found = generate(model, prompt, max_bytes=30, stop=[cut])
        assert found == expected[: expected.find(cut)]


def test_a_model_of_tokens_that_was_saved_is_the_same(tmp_path):
    description = ModelDescription(
        model=TransformerConfig(
            dim=32,
            num_layers=2,
            num_heads=2,
            ffn_dim=48,
            vocab_size=TOKENIZER.vocab_size,
            hash_embeddings=NGRAMS,
        ),
        tokens=True,
    )
    model = token_model()
    save_model(tmp_path / "m", model, description)
    lm = load(tmp_path / "m", "cpu")
    assert lm.bits_per_byte(TEXT[:300]) == pytest.approx(
        total(evaluate(model, [("", TEXT[:300])], context_bytes=8192).values()).bits_per_byte
    )
    assert lm.generate("the ", max_bytes=12) == generate(model, b"the ", max_bytes=12)
    with pytest.raises(ConfigError, match="token models have no byte entropies"):
        lm.entropies("the")
    with pytest.raises(CheckpointError, match="it is a token model"):
        load_scorer(tmp_path / "m", reset_at_newline=False)
