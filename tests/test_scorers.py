import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    NGRAMS,
    byte_strings,
    cut,
    fitted_ngram_scorer,
    ids_of,
    pack,
    piece_sizes,
    random_ids,
    random_scorer,
)
from bytelm import codec
from bytelm.patching import entropy
from bytelm.scoring import ContextScorer, group_by_size, score_document, score_documents


class MeanScorer(ContextScorer):
    """A user's scorer: the mean of the last three ids, in thousandths."""

    context = 2

    def score(self, ids, positions):
        total, count = ids.double(), torch.ones_like(ids)
        for back in (1, 2):
            is_there = positions >= back
            total = total + torch.where(is_there, ids.roll(back, -1), 0)
            count = count + is_there
        return (total / count / 1000).float()


SCORERS = {
    "transformer": random_scorer,
    "with n-grams": lambda: random_scorer(ngrams=NGRAMS),
    "reset": lambda: random_scorer(reset_at_newline=True),
    "n-gram": fitted_ngram_scorer,
    "n-gram, reset": lambda: fitted_ngram_scorer(reset_at_newline=True),
    "a user's": MeanScorer,
}


@pytest.fixture(params=SCORERS, scope="module")
def scorer(request):
    return SCORERS[request.param]()


def test_a_document_scored_in_any_pieces_equals_scoring_it_whole(scorer):
    @given(byte_strings, piece_sizes)
    @torch.no_grad()
    def check(document, sizes):
        ids = ids_of(document)
        state = scorer.new_state()
        pieces = [state.prefill(0, piece) for piece in cut(ids, sizes)]
        torch.testing.assert_close(torch.cat(pieces), scorer.entropies(ids[None])[0])

    check()


def test_a_document_scored_byte_by_byte_equals_scoring_it_whole(scorer):
    @given(byte_strings)
    @torch.no_grad()
    def check(document):
        ids = ids_of(document)
        state = scorer.new_state()
        scores = [state.prefill(0, ids[:1])]
        scores += [state.decode(ids[at : at + 1]) for at in range(1, len(ids))]
        torch.testing.assert_close(torch.cat(scores), scorer.entropies(ids[None])[0])

    check()


def test_documents_of_a_packed_row_do_not_see_each_other(scorer):
    @given(st.lists(byte_strings, min_size=1, max_size=4), st.integers(0, 5))
    @torch.no_grad()
    def check(documents, padding):
        each = [ids_of(d) for d in documents]
        ids, numbers = pack(each, sum(map(len, each)) + padding)
        packed = scorer.entropies(ids[None], numbers[None])[0]
        alone = torch.cat([scorer.entropies(d[None])[0] for d in each])
        torch.testing.assert_close(packed[: len(alone)], alone, rtol=1e-4, atol=1e-5)

    check()


def test_many_documents_are_scored_as_if_one_by_one(scorer):
    @given(st.lists(byte_strings, max_size=6), st.integers(1, 90))
    def check(documents, row_bytes):
        each = [ids_of(d) for d in documents]
        together = score_documents(scorer, each, row_bytes)
        assert len(together) == len(each)
        for found, ids in zip(together, each, strict=True):
            with torch.no_grad():
                expected = scorer.entropies(ids[None])[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    check()


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_groups_keep_order_and_are_as_large_as_they_may_be(sizes, most):
    groups = list(group_by_size(sizes, lambda size: size, most))
    assert [size for group in groups for size in group] == sizes
    for group in groups:
        assert sum(group) <= most or len(group) == 1
    for group, following in pairwise(groups):
        assert sum(group) + following[0] > most


@torch.no_grad()
def test_a_long_document_is_scored_in_bounded_memory_as_if_whole():
    scorer = random_scorer()
    ids = random_ids(5000)
    pieces = list(score_document(scorer, ids, chunk=512))
    assert {len(p) for p in pieces} == {512, 5000 % 512}
    torch.testing.assert_close(torch.cat(pieces), scorer.entropies(ids[None])[0])


@torch.no_grad()
def test_with_a_reset_a_line_is_scored_as_if_it_began_the_context():
    scorer = random_scorer(reset_at_newline=True)
    line = b"\nthe same line"
    once = scorer.entropies(torch.from_numpy(codec.encode(line, bos=False))[None])[0]
    twice = scorer.entropies(ids_of(b"something else" + line + line)[None])[0]
    torch.testing.assert_close(twice[-len(line) :], once)
    torch.testing.assert_close(twice[-2 * len(line) : -len(line)], once)


def test_entropy_is_in_nats():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0.0]]))
    assert entropy(logits.clamp(min=-1e4)).item() == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.zeros(1, 260)).item() == pytest.approx(math.log(260))
