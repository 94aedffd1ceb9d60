from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    CumulativeRule,
    LearnedRule,
    byte_strings,
    cut,
    ids_of,
    pack,
    piece_sizes,
    randomise_module,
)
from bytelm import codec
from bytelm.patching import (
    PADDING,
    ByteRule,
    EntropyRule,
    Patcher,
    SpaceRule,
    StaticRule,
    build_patches,
)

RULES = {
    "byte": ByteRule(),
    "static": StaticRule(4),
    "space": SpaceRule(),
    "global": EntropyRule(threshold=0.6),
    "monotonic": EntropyRule(increase=0.1),
    "combined": EntropyRule(threshold=0.4, increase=0.05),
    "stateful": CumulativeRule(1.3),
    "learned": randomise_module(LearnedRule(5)),
}
patchers = st.builds(
    Patcher, st.sampled_from(list(RULES.values())), st.sampled_from([None, 1, 2, 3, 7])
)


def entropies_of(ids):
    """A stand-in for a scorer: a causal function of the last two ids, in 0..1."""
    previous = ids.roll(1, -1)
    previous[..., :1] = 0
    return ((ids * 37 + previous * 11) % 101).float() / 101


def starts(next_boundary):
    """Positions that start a patch, the position after the last byte included."""
    return [0, *(next_boundary.nonzero().flatten() + 1).tolist()]


def states_of(ids):
    """A stand-in for an encoder: vectors that follow from the last two ids."""
    seen = torch.stack([entropies_of(ids), ids.float() / 260], -1)
    return torch.cat((seen, seen.square(), seen[..., :1].sin()), -1)


def one(patcher, ids):
    with torch.no_grad():
        return patcher.next_boundary(
            ids[None], entropies_of(ids)[None], states=states_of(ids)[None]
        )[0]


@given(patchers, byte_strings, byte_strings)
def test_patching_of_a_prefix_is_the_prefix_of_the_patching(patcher, prefix, rest):
    whole = one(patcher, ids_of(prefix + rest))
    part = one(patcher, ids_of(prefix))
    assert torch.equal(part, whole[: len(part)])


@given(patchers, byte_strings, piece_sizes)
def test_a_stream_fed_in_any_pieces_equals_the_whole(patcher, document, sizes):
    ids = ids_of(document)
    state = patcher.new_state()
    seen = (ids, entropies_of(ids), states_of(ids))
    with torch.no_grad():
        pieces = [
            state.prefill(0, *piece) for piece in zip(*(cut(x, sizes) for x in seen), strict=True)
        ]
    assert torch.equal(torch.cat(pieces), one(patcher, ids))


@given(patchers, st.lists(byte_strings, min_size=1, max_size=3))
def test_slots_fed_byte_by_byte_equal_each_document_alone(patcher, documents):
    each = [ids_of(document) for document in documents]
    state = patcher.new_state(len(each))
    found = [[] for _ in each]
    with torch.no_grad():
        for at in range(max(map(len, each))):
            slots = [slot for slot, ids in enumerate(each) if at < len(ids)]
            seen = [
                [f(each[slot])[at] for slot in slots]
                for f in (torch.clone, entropies_of, states_of)
            ]
            decided = state.decode(*(torch.stack(x) for x in seen), slots=slots)
            for slot, decision in zip(slots, decided, strict=True):
                found[slot].append(decision)
    for decisions, ids in zip(found, each, strict=True):
        assert torch.equal(torch.stack(decisions), one(patcher, ids))


@given(patchers, byte_strings, byte_strings, byte_strings)
def test_a_rule_rewinds(patcher, first, second, third):
    """As if what came after the snapshot had never been seen."""
    state = patcher.new_state()

    def feed(data):
        ids = torch.tensor(list(data), dtype=torch.long) + 4
        with torch.no_grad():
            return state.prefill(0, ids, entropies_of(ids), states_of(ids))

    feed(b"x" + first)
    snapshot = state.snapshot(0)
    expected = feed(second)
    feed(third)
    state.rollback(0, snapshot)
    assert torch.equal(feed(second), expected)
    state.reset(0)
    assert torch.equal(feed(b"x" + first), one(patcher, torch.tensor(list(b"x" + first)) + 4))


@given(patchers, st.lists(byte_strings, min_size=1, max_size=4), st.integers(0, 5))
def test_documents_of_a_packed_row_are_patched_as_if_alone(patcher, documents, padding):
    each = [ids_of(d) for d in documents]
    ids, numbers = pack(each, sum(map(len, each)) + padding)
    entropies = torch.zeros(len(ids))
    entropies[: sum(map(len, each))] = torch.cat([entropies_of(d) for d in each])
    states = torch.zeros(len(ids), 5)
    states[: sum(map(len, each))] = torch.cat([states_of(d) for d in each])
    with torch.no_grad():
        packed = patcher.next_boundary(ids[None], entropies[None], numbers[None], states[None])[0]
    alone = torch.cat([one(patcher, d) for d in each])
    assert torch.equal(packed[: len(alone)], alone)


@given(patchers, byte_strings)
def test_no_patch_is_longer_than_the_limit_and_the_limit_only_adds_boundaries(patcher, document):
    ids = ids_of(document)
    next_boundary = one(patcher, ids)
    unlimited = one(Patcher(patcher.rule), ids)
    assert (next_boundary >= unlimited).all()
    lengths = build_patches(next_boundary[None]).lengths[0]
    if patcher.max_length is not None:
        assert lengths.max() <= patcher.max_length


@given(byte_strings, st.integers(2, 5))
def test_a_long_patch_is_cut_from_its_start(document, limit):
    """Between two boundaries of the rule, cuts come every ``limit`` bytes."""
    ids = ids_of(document)
    rule_starts = starts(one(Patcher(EntropyRule(threshold=0.8)), ids))
    expected = set(rule_starts)
    for begin, end in zip(rule_starts, [*rule_starts[1:], len(ids) + 1], strict=True):
        expected.update(range(begin, end, limit))
    limited = starts(one(Patcher(EntropyRule(threshold=0.8), limit), ids))
    assert limited == sorted(expected)


def test_space_rule_on_multilingual_text():
    boundaries = one(Patcher(SpaceRule()), ids_of("a  b,c é日本 x".encode()))
    assert starts(boundaries) == [0, 1, 3, 6, 8, 11, 14, 17]


def test_space_rule_reproduces_the_papers_figure_3():
    text = b"Daenerys Targaryen is in Game of Thrones, a fantasy epic by George R.R. Martin."
    begins = starts(one(Patcher(SpaceRule()), ids_of(text)))
    pieces = [text[a - 1 : b - 1] for a, b in pairwise(begins[1:])]
    assert b"|".join(pieces).decode() == (
        "Daenerys |Targaryen |is |in |Game |of |Thrones,| a |fantasy |epic |by |George |R.|R.|"
        " Martin."
    )


def test_space_like_bytes_are_exactly_the_papers_classes():
    for byte in range(256):
        first_letter = torch.tensor([[codec.BOS, ord("a") + 4, byte + 4]])
        ends = bool(Patcher(SpaceRule()).next_boundary(first_letter)[0, 2])
        is_letter_or_digit = byte < 128 and chr(byte).isalnum()
        assert ends == (not is_letter_or_digit and not 0x80 <= byte < 0xC0), byte


def test_a_patch_begins_after_each_special_id():
    ids = torch.tensor([[codec.BOS, 70, 71, codec.BPE, 72, codec.BPE]])
    assert starts(Patcher(SpaceRule()).next_boundary(ids)[0]) == [0, 1, 4, 6]


def test_static_patches_begin_at_multiples_after_the_first_byte():
    boundaries = one(Patcher(StaticRule(4)), ids_of(b"0123456789"))
    assert starts(boundaries) == [0, 1, 4, 8]


def test_entropy_rules_are_strict_and_read_the_entropy_of_the_next_byte():
    ids = torch.full((1, 5), 70)
    entropies = torch.tensor([[0.0, 1.0, 2.0, 2.5, 1.0]])

    def boundaries(**options):
        return starts(Patcher(EntropyRule(**options)).next_boundary(ids, entropies)[0])

    assert boundaries(threshold=2.0) == [0, 1, 4]
    assert boundaries(increase=0.5) == [0, 1, 2, 3]
    assert boundaries(threshold=1.0, increase=0.4) == [0, 1, 3, 4]


def test_entropy_rule_needs_a_threshold_and_entropies():
    with pytest.raises(ValueError, match="needs a threshold"):
        EntropyRule()
    with pytest.raises(ValueError, match="needs entropies"):
        Patcher(EntropyRule(threshold=1.0)).next_boundary(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="max_length must be at least 1, not 0"):
        Patcher(ByteRule(), 0)


def alignment_by_loop(boundary_after, documents):
    """The alignment as one would write it down: walk the bytes, keep count."""
    encoder, decoder, count, last_complete = [], [], -1, -1
    firsts = [i == 0 or documents[i - 1] != document for i, document in enumerate(documents)]
    boundary_after = [a or b for a, b in zip(boundary_after, firsts, strict=True)]
    for i, document in enumerate(documents):
        if document == PADDING:
            encoder.append(None)
            decoder.append(0)
            continue
        if firsts[i] or boundary_after[i - 1]:
            count += 1
        encoder.append(count)
        if boundary_after[i]:
            last_complete = count
        decoder.append(last_complete)
    total = count + 1
    return [total if e is None else e for e in encoder], decoder, total


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_alignment_equals_a_walk_over_the_bytes(rows, padding, spare):
    documents = [i for i, row in enumerate(rows) for _ in row] + [PADDING] * padding
    decisions = [d for row in rows for d in row] + [True] * padding
    encoder, decoder, count = alignment_by_loop(decisions, documents)
    patches = build_patches(
        torch.tensor([decisions]), torch.tensor([documents]), num_patches=count + spare
    )
    assert patches.encoder_ids[0].tolist() == [count + spare if e == count else e for e in encoder]
    assert patches.decoder_ids[0].tolist() == decoder
    assert patches.counts.item() == count
    assert patches.lengths[0].tolist() == [encoder.count(p) for p in range(count)] + [0] * spare
    owners = [documents[encoder.index(p)] for p in range(count)]
    assert patches.patch_documents[0].tolist() == owners + [PADDING] * spare
    expected = [owners[:p].count(owners[p]) for p in range(count)]
    assert patches.patch_positions[0, :count].tolist() == expected
    # What the decoder reads is complete, and of the byte's own document.
    for i, document in enumerate(documents):
        if document != PADDING:
            assert owners[decoder[i]] == document


@given(byte_strings)
def test_patch_count_is_found_where_it_is_not_given(document):
    boundaries = one(Patcher(RULES["global"]), ids_of(document))[None]
    patches = build_patches(boundaries)
    assert patches.num_patches == patches.counts.item()
    assert patches.lengths.sum() == boundaries.shape[1]
