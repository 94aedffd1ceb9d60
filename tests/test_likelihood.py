import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import (
    byte_strings,
    ids_of,
    random_blt,
    random_byte_lm,
    random_patched,
    random_transformer,
    threshold_between,
)
from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.likelihood import evaluate, total
from bytelm.lm import PatchedLM
from bytelm.patching import EntropyRule, Patcher, SpaceRule, build_patches
from bytelm.scoring import TransformerScorer
from bytelm.training import objective

MODELS = {
    "patched": random_patched,
    "reset": lambda: random_patched(reset=True),
    "space": lambda: random_patched(rule=SpaceRule()),
    "transformer": random_byte_lm,
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]()


def nats_by_definition(model, data):
    ids = ids_of(data)
    with torch.no_grad():
        chances = model(ids[None])[0].log_softmax(-1)
    return -sum(chances[i, ids[i + 1]].item() for i in range(len(data)))


def test_bits_per_byte_is_the_definition_however_documents_are_packed(model):
    @settings(max_examples=15)
    @given(st.lists(byte_strings, min_size=1, max_size=6))
    def check(documents):
        labelled = [("ab"[i % 2], d) for i, d in enumerate(documents)]
        found = evaluate(model, labelled, context_bytes=200)
        for label in found:
            own = [d for name, d in labelled if name == label]
            expected = sum(nats_by_definition(model, d) for d in own)
            assert found[label].num_bytes == sum(map(len, own))
            assert found[label].nats == pytest.approx(expected, rel=1e-4, abs=1e-3)

    check()


@pytest.mark.parametrize("stride", [None, 1, 7, 30])
def test_every_byte_is_scored_once_whatever_the_stride(model, stride):
    data = b"a text that is longer than the context, " * 5
    found = evaluate(model, [("x", data)], context_bytes=30, stride=stride)["x"]
    assert found.num_bytes == len(data)
    assert found.num_positions == len(data) + 1
    if found.num_units:
        assert 1 <= found.unit_bytes <= 30


def test_overlap_gives_bytes_more_context_and_pieces_keep_whole_document_entropies():
    """With a stride of one, each byte is predicted from exactly the context before it."""
    model, context = random_byte_lm(window=None), 12
    data = b"forty bytes of text, give or take a few."
    ids = torch.from_numpy(codec.encode(data))
    expected = 0.0
    with torch.no_grad():
        for i in range(len(data)):
            begin = max(i + 1 - context, 0)
            chances = model(ids[None, begin : i + 1])[0, -1].log_softmax(-1)
            expected -= chances[ids[i + 1]].item()
    found = evaluate(model, [("x", data)], context_bytes=context, stride=1)["x"]
    assert found.nats == pytest.approx(expected, rel=1e-5)


def test_patches_are_those_of_the_whole_document():
    # The scorer of this model sees farther than a piece is long.
    model = wide_scorer_model()
    data = b"one document, patched as a whole, whatever the pieces " * 3
    whole = model.segment(ids_of(data)[None])
    assert evaluate(model, [("x", data)], context_bytes=1000)["x"].num_units == (
        whole.patches.num_patches
    )
    pieces = evaluate(model, [("x", data)], context_bytes=20, stride=1)["x"]
    assert pieces.num_units == whole.patches.num_patches

    # Without overlap each piece begins with a patch of one byte; all other patches are the same.
    ids, cut = codec.encode(data, eos=True), 0
    assert whole.entropies is not None
    for begin in range(0, len(ids) - 1, 20):
        piece = torch.from_numpy(ids[begin : begin + 20])[None, : len(ids) - 1 - begin]
        entropies = whole.entropies[:, begin : begin + 20]
        boundary = model.patcher.next_boundary(piece, entropies)
        cut += build_patches(boundary).num_patches
    found = evaluate(model, [("x", data)], context_bytes=20)["x"]
    assert found.num_units == cut


def wide_scorer_model():
    scorer = TransformerScorer(random_transformer(1, num_layers=2, window=64))
    data = ids_of(b"one document, patched as a whole, whatever the pieces " * 3)
    with torch.no_grad():
        threshold = threshold_between(scorer.entropies(data[None]), 0.6)
    return PatchedLM(random_blt(), Patcher(EntropyRule(threshold=threshold)), scorer).eval()


def test_rows_are_no_longer_than_what_they_hold(monkeypatch):
    lengths = []
    inner = objective.make_batch

    def watched(rows):
        batch = inner(rows)
        lengths.append(batch.ids.shape[1])
        return batch

    monkeypatch.setattr(objective, "make_batch", watched)
    evaluate(random_byte_lm(), [("x", b"short"), ("x", b"also")], context_bytes=1000)
    assert lengths == [11]


def test_totals():
    found = evaluate(random_patched(), [("a", b"xy"), ("b", b"z")], context_bytes=9)
    everything = total(found.values())
    assert everything.num_bytes == 3
    assert everything.bits_per_byte == pytest.approx(
        (found["a"].nats + found["b"].nats) / 3 / math.log(2)
    )
    assert math.isnan(total([]).bits_per_byte)


def test_text_without_bytes_and_bad_strides():
    model = random_byte_lm()
    assert evaluate(model, [("a", b"")], context_bytes=9)["a"].num_bytes == 0
    assert evaluate(model, [], context_bytes=9) == {}
    for stride in (-1, 0, 10):
        with pytest.raises(ConfigError, match=f"between 1 and 9, not {stride}"):
            evaluate(model, [("a", b"x")], context_bytes=9, stride=stride)
