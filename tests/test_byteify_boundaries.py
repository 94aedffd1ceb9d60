"""Scorers of boundaries: what is counted, and how patches compare with tokens."""

import numpy as np
import pytest
import torch

import bytelm
from bytelm import codec
from bytelm.byteify import byteify
from bytelm.byteify.boundaries import (
    BoundaryCounting,
    Divided,
    agreement,
    divide,
    fit_boundary_scorer,
    known_ends,
)
from bytelm.byteify.donor import open_donor
from bytelm.byteify.teacher import read_vocabulary
from bytelm.scoring import score_documents
from commands import invoke
from test_byteify import SMALL, TEXT, save_donor


def divided(tokens):
    data = b"".join(tokens)
    return Divided(torch.from_numpy(codec.encode(data)), known_ends([len(one) for one in tokens]))


def test_ends_of_tokens_are_known_with_bos_and_the_bytes_after_them():
    assert known_ends([2, 1, 3]).tolist() == [True, False, False, True, True, False, False]


def test_probabilities_are_counted_by_context():
    # A token has ended before "b" once of 2 times, never before "a"; longer contexts are too rare.
    documents = [divided([b"a", b"b"]), divided([b"a"]), divided([b"ab"])]
    scorer, config = fit_boundary_scorer(documents, BoundaryCounting(max_order=2, min_count=2))
    share = 4 / 8
    a, bos, b = share / 4, (3 + share) / 4, (1 + share) / 3
    found = scorer.entropies(documents[0].ids[None])[0]
    expected = torch.tensor([bos, a / 4, (1 + b) / 3])
    torch.testing.assert_close(found, expected)
    assert config.num_contexts == len(scorer.keys)
    assert float(scorer.default) == pytest.approx(share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_donor(tmp_path_factory.mktemp("donor"), "llama 3.1")


def test_texts_are_divided_as_the_donor_does(folder):
    donor = open_donor(folder)
    vocabulary = read_vocabulary(donor)
    texts = [b"The cat number 3", b"\xffThe", b"a <|endoftext|> b"]
    found = divide(donor, vocabulary, texts)
    assert [codec.decode(one.ids) for one in found] == [b"The cat number 3", b"The"]
    tokens = donor.encode("The cat number 3")
    assert (
        found[0].is_end.tolist()
        == known_ends([len(vocabulary.tokens[token]) for token in tokens]).tolist()
    )


def test_patches_are_compared_with_tokens():
    document = divided([b"ab", b"cd", b"e", b"fgh"])
    patches = np.array([False, False, False, True, True, True, False, False, False])
    found = agreement([document], [patches])
    assert found == (pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 8 / 4)


def test_learned_boundaries_agree_better_than_entropies(folder, tmp_path):
    """The text is regular, so that both can do well."""
    donor = open_donor(folder)
    documents = divide(
        donor, read_vocabulary(donor), [TEXT[at : at + 500].encode() for at in range(0, 9000, 500)]
    )
    scorer, _ = fit_boundary_scorer(documents[:-2], BoundaryCounting())
    held = documents[-2:]
    scores = score_documents(scorer, [one.ids for one in held])
    found = agreement(held, [(one > 0.5).numpy() for one in scores])
    assert found.f1 > 0.9
    # A boundary at every byte has all ends, and few of its boundaries are ends.
    every = agreement(held, [np.ones(len(one.ids), bool) for one in held])
    assert every.recall == 1
    assert every.f1 < 0.7


def test_a_model_with_learned_boundaries_is_a_checkpoint_like_any_other(folder, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(TEXT)
    made = byteify(folder, text, out, sizes=SMALL, boundaries=True)
    lm = bytelm.load(out, "cpu")
    assert 0 < made.description.patching.threshold < 1
    whole = lm.patch(TEXT[:400])
    assert len(TEXT[:400]) / len(whole.patches) == pytest.approx(made.bytes_per_token, rel=0.2)
    # The patches of a prefix are those of the text, and a session finds the same.
    part = lm.patch(TEXT[:123]).patches
    assert part[:-1] == whole.patches[: len(part) - 1]


def test_boundaries_and_a_scorer_exclude_each_other(folder, tmp_path, capsys):
    arguments = (folder, tmp_path, "--out", tmp_path / "model", "--boundaries", "--scorer", folder)
    assert invoke("byteify", *arguments) == 1
    assert "leave out one of them" in capsys.readouterr().err
