import math

import pytest
import torch
from hypothesis import given

from builders import NGRAMS, byte_strings, cut, ids_of, piece_sizes, random_ids, random_scorer
from bytelm import codec
from bytelm.model.scorers import entropy, score_document


@pytest.mark.parametrize("ngrams", [None, NGRAMS], ids=["bytes", "n-grams"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_stream_fed_in_any_pieces_equals_scoring_the_document_whole(reset, ngrams):
    scorer = random_scorer(reset_at_newline=reset, ngrams=ngrams)

    @given(byte_strings, piece_sizes)
    @torch.no_grad()
    def check(document, sizes):
        ids = ids_of(document)
        stream = scorer.stream()
        pieces = [stream.feed(piece) for piece in cut(ids, sizes)]
        torch.testing.assert_close(torch.cat(pieces), scorer.entropies(ids[None])[0])

    check()


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
