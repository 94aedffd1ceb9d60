import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import byte_strings, cut, ids_of, pack, piece_sizes
from bytelm import codec
from bytelm.config import NgramConfig
from bytelm.scoring import fit_ngram_scorer

TEXT = [b"the cat sat on the mat\n", b"the dog\nsat on the log\n" * 3, b"", b"\xff\x00\xff\x00"]


def fit(config):
    return fit_ngram_scorer([codec.encode(d, eos=True) for d in TEXT], config)


def entropy_by_definition(documents, context, config):
    """The interpolated distribution after ``context``, written as its recursion."""
    sequences = [codec.encode(d, eos=True).tolist() for d in documents]

    def followers(c):
        k = len(c)
        return Counter(
            s[i + k]
            for s in sequences
            for i in range(len(s) - k)
            if tuple(s[i : i + k]) == c and (k or i)
        )

    def distribution(c):
        lower = distribution(c[1:]) if c else [1 / codec.VOCAB_SIZE] * codec.VOCAB_SIZE
        counts = followers(c)
        total, kinds = sum(counts.values()), len(counts)
        if c and total < config.min_count:
            return lower
        return [(counts[b] + kinds * lower[b]) / (total + kinds) for b in range(codec.VOCAB_SIZE)]

    while context and sum(followers(context).values()) < config.min_count:
        context = context[1:]
    return -sum(p * math.log(p) for p in distribution(context))


def test_entropies_equal_the_definition():
    config = NgramConfig(max_order=3, min_count=2)
    scorer = fit(config)
    ids = ids_of(b"the cat, the log \xff")
    entropies = scorer.entropies(ids[None])[0]
    for i in range(len(ids)):
        context = tuple(ids[max(i - 2, 0) : i + 1].tolist())
        expected = entropy_by_definition(TEXT, context, config)
        assert entropies[i].item() == pytest.approx(expected, rel=1e-4), i


@pytest.mark.parametrize("reset", [False, True])
def test_a_stream_fed_in_any_pieces_equals_scoring_the_document_whole(reset):
    scorer = fit(NgramConfig(max_order=4, min_count=1))
    scorer.reset_at_newline = reset

    @given(byte_strings, piece_sizes)
    def check(document, sizes):
        ids = ids_of(document)
        state = scorer.new_state()
        pieces = [state.prefill(0, piece) for piece in cut(ids, sizes)]
        assert torch.equal(torch.cat(pieces), scorer.entropies(ids[None])[0])

    check()


@given(st.lists(byte_strings, min_size=1, max_size=4))
def test_documents_of_a_packed_row_do_not_see_each_other(documents):
    scorer = fit(NgramConfig(max_order=4, min_count=1))
    each = [ids_of(d) for d in documents]
    ids, numbers = pack(each)
    packed = scorer.entropies(ids[None], numbers[None])[0]
    assert torch.equal(packed, torch.cat([scorer.entropies(d[None])[0] for d in each]))


def test_with_a_reset_a_line_is_scored_as_if_it_began_the_context():
    scorer = fit(NgramConfig(max_order=4, min_count=1))
    scorer.reset_at_newline = True
    once = scorer.entropies(torch.from_numpy(codec.encode(b"\nthe dog", bos=False))[None])[0]
    after = scorer.entropies(ids_of(b"on the log\nthe dog")[None])[0]
    assert torch.equal(after[-len(once) :], once)


def test_rare_contexts_are_dropped_least_frequent_first():
    full = fit(NgramConfig(max_order=2, min_count=1))
    capped = fit(NgramConfig(max_order=2, min_count=1, max_contexts=5))
    assert len(capped.keys) == 10 < len(full.keys)


def test_no_text_gives_a_uniform_scorer():
    scorer = fit_ngram_scorer([], NgramConfig())
    assert scorer.entropies(ids_of(b"ab")[None]).tolist() == [
        pytest.approx([math.log(codec.VOCAB_SIZE)] * 3)
    ]
