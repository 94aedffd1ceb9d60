"""What must hold of every model: causality, isolation of documents, independence of rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    BLT_VARIANTS,
    LargestTensor,
    blt_config,
    byte_strings,
    ids_of,
    lm_models,
    pack,
    random_blt,
    random_ids,
    random_patched,
    threshold_between,
)
from bytelm import codec
from bytelm.model.blt import BLT
from bytelm.model.embedding import PRIMES, ngram_hashes
from bytelm.patching import EntropyRule, Patcher, StaticRule, build_patches

MODELS = lm_models()


# Other rules cut the same rows elsewhere: they are in the slow stage.
RULES = {"static", "monotonic", "combined", "never a boundary", "capped"}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow if name in RULES else ()) for name in MODELS],
    scope="module",
)
def model(request):
    return MODELS[request.param]()


def logits_of(model, ids, documents=None):
    with torch.no_grad():
        return model(ids, documents)


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_logits_do_not_depend_on_later_bytes(model):
    @given(byte_strings, byte_strings, byte_strings)
    def check(prefix, rest, other_rest):
        a, b = ids_of(prefix + rest), ids_of(prefix + other_rest)
        shared = len(prefix) + 1
        assert_equal(logits_of(model, a[None])[:, :shared], logits_of(model, b[None])[:, :shared])

    check()


def test_documents_of_a_packed_row_do_not_see_each_other(model):
    @given(st.lists(byte_strings, min_size=1, max_size=4), st.integers(0, 9))
    def check(documents, padding):
        each = [ids_of(d) for d in documents]
        ids, numbers = pack(each, sum(map(len, each)) + padding)
        packed = logits_of(model, ids[None], numbers[None])[0]
        alone = torch.cat([logits_of(model, d[None])[0] for d in each])
        assert_equal(packed[: len(alone)], alone)

    check()


def test_rows_do_not_see_each_other(model):
    @given(st.lists(byte_strings, min_size=2, max_size=3))
    def check(documents):
        length = max(map(len, documents)) + 3
        rows = [pack([ids_of(d)], length) for d in documents]
        together = logits_of(model, *(torch.stack(x) for x in zip(*rows, strict=True)))
        for row, (ids, numbers) in zip(together, rows, strict=True):
            used = numbers >= 0
            assert_equal(row[used], logits_of(model, ids[used][None])[0])

    check()


def test_a_change_reaches_the_logits_after_it(model):
    """Guards the tests above against a model that ignores its input."""
    ids = random_ids(40)[None]
    ids[0, 0] = codec.BOS
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 17) % codec.VOCAB_SIZE
    difference = (logits_of(model, ids) - logits_of(model, changed)).abs().amax(-1)[0]
    assert difference[20:].max() > 1e-2


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_every_parameter_of_a_blt_receives_a_gradient(variant):
    blt = random_blt(variant)
    ids = random_ids(50)[None]
    next_boundary = random_ids(50, seed=1)[None] % 4 == 0
    blt(ids, build_patches(next_boundary)).logsumexp(-1).sum().backward()
    one_slot = blt.decoder.slots == 1
    for name, parameter in blt.named_parameters():
        assert parameter.grad is not None, name
        if one_slot and "decoder.cross_attention" in name and "query" in name:
            continue  # a softmax over one slot does not depend on its query
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", sorted(BLT_VARIANTS.keys() - {"vocabulary"}))
@torch.no_grad()
def test_what_branches_add_begins_at_zero(variant):
    """Before training a byte predicts from its own embedding alone, whatever the patches are."""
    model = BLT(blt_config(variant))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = random_ids(40)[None]
    documents = torch.zeros_like(ids)
    cuts = torch.arange(40)[None] % 3 == 0
    others = torch.arange(40)[None] % 7 == 0
    embedded = model.encoder.embedding(ids, torch.arange(40)[None])
    scale = 1.0
    for cross in model.decoder.cross_attention:
        scale *= cross.residual_scale
    alone = model.decoder.output(model.decoder.norm(embedded * scale))
    for cut in (cuts, others):
        logits = model(ids, build_patches(cut, documents, 40))
        torch.testing.assert_close(logits, alone.float())


def test_latents_carry_information_past_the_byte_window():
    """A change far beyond every byte-level window still moves the logits, through the latents."""
    model = random_patched(rule=StaticRule(4))
    ids = random_ids(300)[None]
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % codec.VOCAB_SIZE
    difference = (logits_of(model, ids) - logits_of(model, changed))[0, -1].abs().max()
    assert difference > 1e-5


def test_a_patch_limit_changes_patches_but_not_what_must_hold():
    model = random_patched(max_length=3)
    patches = model.segment(random_ids(200)[None]).patches
    assert patches.lengths.max() == 3


def test_ngram_hashes_match_published_vectors():
    ids = torch.tensor([[codec.BOS, *(b + codec.OFFSET for b in b"BLT!")]])
    hashes = ngram_hashes(ids, torch.arange(5)[None], (3, 4, 5, 6, 7, 8), PRIMES[0]) % 500_002
    assert hashes[0].T.tolist() == [
        [443987, 460965, 125301, 233820, 269147],
        [437197, 407195, 103129, 72033, 41565],
        [123201, 333213, 228211, 409751, 112940],
        [166353, 469799, 132825, 148135, 12250],
        [34117, 133519, 278133, 310593, 199952],
        [172383, 381799, 187511, 97173, 425696],
    ]


@given(byte_strings, st.sampled_from(PRIMES))
def test_ngram_hashes_equal_big_integer_arithmetic(document, prime):
    ids = ids_of(document)
    hashes = ngram_hashes(ids[None], torch.arange(len(ids))[None], (2, 8), prime)[0]
    padded = [0] * 7 + ids.tolist()
    for column, n in enumerate((2, 8)):
        for i in range(len(ids)):
            gram = padded[i + 8 - n : i + 8]
            value = sum(x * prime**k for k, x in enumerate(gram)) % 2**64
            assert hashes[i, column].item() % 2**64 == value


def test_an_entropy_rule_cuts_where_the_scorers_entropy_exceeds_the_threshold():
    model = random_patched()
    ids = random_ids(200)[None]
    segmentation = model.segment(ids)
    assert segmentation.entropies is not None
    threshold = threshold_between(segmentation.entropies, 0.5)
    model.patcher = Patcher(EntropyRule(threshold=threshold))
    patches = model.segment(ids).patches
    starts = torch.zeros(200, dtype=torch.bool)
    starts[:2] = True
    starts[2:] = segmentation.entropies[0, 1:-1] > threshold
    assert torch.equal(patches.encoder_ids[0], starts.cumsum(0) - 1)


def test_no_tensor_of_a_whole_model_is_bytes_by_patches():
    model, num_bytes = random_patched(rule=StaticRule(2)), 4096
    with LargestTensor() as largest, torch.no_grad():
        model(random_ids(num_bytes)[None])
    assert 0 < largest.num_bytes < num_bytes * num_bytes // 2


def test_documents_cut_in_the_middle_are_isolated_too():
    """What follows the cut of a long document begins with an ordinary byte, not with BOS."""
    model = random_patched()
    pieces = [random_ids(n, seed=n) for n in (37, 1, 80)]
    ids, numbers = pack(pieces, 130)
    packed = logits_of(model, ids[None], numbers[None])[0]
    begin = 0
    for piece in pieces:
        alone = logits_of(model, piece[None])[0]
        torch.testing.assert_close(packed[begin : begin + len(piece)], alone, rtol=1e-4, atol=1e-5)
        begin += len(piece)
