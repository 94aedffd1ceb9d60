"""A vocabulary's probabilities of bytes, against sums over its pieces."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import PIECES, blt_config, byte_strings, ids_of, random_blt, random_patched
from bytelm import codec
from bytelm.accounting import forward_flops
from bytelm.model.blt import named
from bytelm.model.vocabulary import NOWHERE, build_trie
from bytelm.patching import build_patches
from bytelm.training.parts import parts_by_parameter

BLT = random_blt("vocabulary")
VOCABULARY = BLT.vocabulary
SINCE = st.sampled_from(
    [piece[:size] for piece in PIECES for size in (0, 1, 2) if len(piece) >= size]
)


def node_of(data):
    node = torch.tensor([0])
    for byte in data:
        node = VOCABULARY.step(node, torch.tensor([byte + codec.OFFSET]))
    return node


@given(SINCE | st.binary(max_size=4))
def test_nodes_are_the_beginnings_of_pieces(data):
    is_beginning = any(piece.startswith(data) for piece in PIECES)
    node = node_of(data)
    assert (int(node) != NOWHERE) == is_beginning
    if is_beginning:
        begin, end = int(VOCABULARY.begins[node]), int(VOCABULARY.ends[node])
        assert PIECES[begin:end] == [piece for piece in PIECES if piece.startswith(data)]
        assert (int(VOCABULARY.inner[node]) > begin) == (data in PIECES)


@given(SINCE, st.integers(0, 99))
def test_the_next_byte_sums_the_pieces_that_agree(data, seed):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, 48, generator=generator)
    logits = torch.randn(1, codec.VOCAB_SIZE + 1, generator=generator)
    found = VOCABULARY.mix(
        logits, VOCABULARY.masses(latent), torch.tensor([0]), node_of(data)
    ).exp()
    weights = VOCABULARY.head(VOCABULARY.norm(latent)).double().softmax(-1)[0].tolist()
    spelled, own = torch.zeros(codec.VOCAB_SIZE, dtype=torch.double), 0.0
    for piece, weight in zip(PIECES, weights, strict=True):
        if piece == data:
            own = weight
        elif piece.startswith(data):
            spelled[piece[len(data)] + codec.OFFSET] += weight
    expected = logits[0, :-1].double().softmax(-1)
    if going := float(spelled.sum()):
        odds = (own + 1e-3 * (own + going)) / going * float(logits[0, -1].double().exp())
        share = odds / (1 + odds)
        expected = share * expected + (1 - share) * spelled / going
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_a_patch_is_read_as_the_piece_that_it_names():
    """The bytes from the last one of the patch before to the one before its own last."""
    data = b"and then e and"
    ids = ids_of(data)[None]
    ends = torch.zeros_like(ids, dtype=torch.bool)
    # Patches end with the first byte of "_then", of "_e" and of "_and".
    ends[0, [0, 4, 9, 11]] = True
    patches = build_patches(ends)
    nodes = VOCABULARY.walk(ids, patches.ends)
    pieces = [b"", b"and", b" then", b" e"]
    names = named(nodes, patches)[0, :4]
    assert [int(one) for one in names] == [int(node_of(piece)) for piece in pieces]
    vectors = torch.zeros(1, 4, 48)
    read = VOCABULARY.read(vectors, names[None])[0]
    for piece, vector in zip(pieces, read, strict=True):
        wanted = torch.zeros(48)
        if piece in PIECES:
            wanted = VOCABULARY.embedding.weight[PIECES.index(piece)]
        assert torch.equal(vector, wanted)


@given(byte_strings, st.data())
def test_a_walk_in_parts_is_the_walk(data, draw):
    ids = ids_of(data)[None]
    ends = torch.rand(ids.shape, generator=torch.Generator().manual_seed(len(data))) < 0.3
    ends[0, 0] = True
    whole = VOCABULARY.walk(ids, ends)
    cut = draw.draw(st.integers(1, ids.shape[1]))
    first = VOCABULARY.walk(ids[:, :cut], ends[:, :cut])
    rest = VOCABULARY.walk(ids[:, cut:], ends[:, cut:], first[:, -1])
    assert torch.equal(torch.cat((first, rest), 1), whole)


def test_gradients_reach_latents_embeddings_and_gate():
    lm = random_patched("vocabulary")
    ids = ids_of(b"and then an ant and the end, and then")[None]
    lm(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean().backward()
    blt = lm.blt
    for weight in (blt.vocabulary.embedding.weight, blt.vocabulary.head.weight):
        assert weight.grad.abs().sum() > 0
    assert blt.decoder.output.weight.grad[-1].abs().sum() > 0
    assert blt.global_model.blocks[0].attention.qkv.weight.grad.isfinite().all()


def test_its_parameters_are_a_part_of_their_own():
    parts = parts_by_parameter(BLT)
    own = {name: part for name, part in parts.items() if name.startswith("vocabulary.")}
    assert own.keys() == {f"vocabulary.{name}.weight" for name in ("embedding", "norm", "head")}
    assert set(own.values()) == {("vocabulary",)}


def test_costs_have_the_head_of_the_vocabulary():
    costs = forward_flops(blt_config("vocabulary"), 100, 20)
    assert costs["vocabulary"].linear == 2 * 48 * len(PIECES) * 20


def test_tries_of_one_piece_and_of_nested_ones():
    trie = build_trie([b"", b"a", b"aa", b"ab"])
    assert trie["keys"].tolist() == [97, 256 + 97, 256 + 98]
    assert trie["branches"].tolist() == [0, 1, 3, 3, 3]
    assert trie["begins"].tolist() == [0, 1, 2, 3]
    assert trie["inner"].tolist() == [1, 2, 3, 4]
    assert trie["ends"].tolist() == [4, 4, 3, 4]
