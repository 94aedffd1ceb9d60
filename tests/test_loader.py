import json
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import SPACE_BLT
from bytelm import codec
from bytelm.config import Recipe, parse
from bytelm.data import (
    IGNORED,
    OPEN_SPANS,
    Dataset,
    Loader,
    LoaderState,
    PrepareOptions,
    ReadOptions,
    Row,
    prepare,
)
from bytelm.data.balancing import best_cut
from bytelm.data.packing import make_batch
from bytelm.errors import DataError
from bytelm.patching import EntropyRule, Patcher, SpaceRule, build_patcher, build_patches
from bytelm.training import resolve
from bytelm.training.rows import load_rows
from bytelm.units import ByteUnits, PatchUnits, Span

SIZES = {"alpha": [5, 700, 40], "beta": [1, 1, 90], "gamma": [2000]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Seven documents of very different lengths in three sources; no two bytes in a row equal."""
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    lines = []
    for source, sizes in SIZES.items():
        for size in sizes:
            text = "".join(rng.choice(list("abc de. fgh"), size))
            lines.append(json.dumps({"text": text, "source": source}))
    (folder / "x.jsonl").write_text("\n".join(lines))
    options = PrepareOptions(read=ReadOptions(source_field="source"), validation_share=0.0)
    prepare([str(folder / "x.jsonl")], folder / "d", options)
    return Dataset(folder / "d", "train")


def loader(dataset, **changes):
    options = {
        "row_bytes": 64,
        "row_units": 20,
        "rows_per_step": 6,
        "units": PatchUnits(Patcher(SpaceRule())),
        "seed": 3,
    }
    return Loader(dataset, **{**options, **changes})


def equal(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def rows_of(batch):
    return [tuple(row.tolist()) for row in torch.cat((batch.ids, batch.targets), 1)]


@pytest.mark.parametrize("packing", ["in-order", "balanced"])
@pytest.mark.parametrize("mixture", [None, {"alpha": 1.0, "gamma": 2.0}])
def test_a_restored_loader_goes_on_exactly(dataset, mixture, packing):
    first = loader(dataset, mixture=mixture, packing=packing)
    states, batches = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(vars(first.state()))))
        batches.append(first.next_batch())
    for step in range(12):
        resumed = loader(dataset, mixture=mixture, packing=packing)
        resumed.restore(LoaderState(**states[step]))
        assert resumed.step == step
        for expected in batches[step : step + 2]:
            assert equal(resumed.next_batch(), expected)


def test_a_state_of_earlier_versions_is_restored(dataset):
    """They had one span in progress, which could be used up."""
    first = loader(dataset)
    for _ in range(20):
        state = first.state()
        streams = []
        for stream in state.streams:
            document, begin, end = stream["open"][0] if stream["open"] else (3, 7, 7)
            old = {"draws": stream["draws"], "document": document, "begin": begin, "end": end}
            streams.append(old)
        resumed = loader(dataset)
        resumed.restore(LoaderState(state.step, streams))
        assert equal(resumed.next_batch(), first.next_batch())


@pytest.mark.parametrize("mixture", [None, {"alpha": 1.0, "beta": 1.0, "gamma": 1.0}])
@pytest.mark.parametrize(
    ("world_size", "packing"), [(2, "balanced"), (3, "in-order"), (4, "in-order"), (6, "balanced")]
)
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(
    dataset, world_size, packing, mixture
):
    settings = {"mixture": mixture, "packing": packing}
    alone = loader(dataset, **settings)
    ranks = [loader(dataset, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    for _ in range(5):
        expected = rows_of(alone.next_batch())
        together = [row for rank in ranks for row in rows_of(rank.next_batch())]
        assert Counter(together) == Counter(expected)


@pytest.mark.parametrize("packing", ["balanced", "in-order"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (6, 2), (3, 1)])
def test_any_number_of_ranks_goes_on_where_others_stopped(dataset, packing, before, after):
    def ranks(size):
        return [loader(dataset, rank=r, world_size=size, packing=packing) for r in range(size)]

    alone, first, second = loader(dataset, packing=packing), ranks(before), ranks(after)
    for _ in range(4):
        alone.next_batch()
        for rank in first:
            rank.next_batch()
    state = LoaderState.join([rank.state() for rank in first])
    assert state == alone.state()
    for rank in second:
        rank.restore(state)
    for _ in range(3):
        together = [row for rank in second for row in rows_of(rank.next_batch())]
        assert Counter(together) == Counter(rows_of(alone.next_batch()))


def test_every_id_is_a_target_once_an_epoch(dataset):
    """Over whole epochs, every position of every document is predicted equally often."""
    one = loader(dataset, rows_per_step=1, row_units=None, units=ByteUnits())
    seen = Counter()
    total = sum(n + 1 for sizes in SIZES.values() for n in sizes)
    state = one._streams[0]
    while True:
        row = one._fill(0)
        for span in row.spans:
            for offset in range(span.num_positions):
                seen[span.document, span.begin + offset] += 1
        if sum(seen.values()) >= 3 * total and not state.open:
            break
    positions = {(d, p) for d in range(len(dataset)) for p in range(int(dataset.lengths[d]) + 1)}
    assert set(seen) == positions
    assert max(seen.values()) - min(seen.values()) <= 1


@pytest.mark.parametrize("room", [8, 14, 64])
def test_balanced_rows_use_every_position_that_is_drawn_once(dataset, room):
    one = loader(dataset, rows_per_step=1, row_units=room, packing="balanced")
    drawn, used = Counter(), Counter()
    draw, state = one._draw, one._streams[0]

    def draw_and_count(number, state):
        draw(number, state)
        document, begin, end = state.open[-1]
        drawn.update((document, at) for at in range(begin, end))

    one._draw = draw_and_count
    for _ in range(200):
        for span in one._fill(0).spans:
            used.update((span.document, span.begin + n) for n in range(span.num_positions))
    for document, begin, end in state.open:
        used.update((document, at) for at in range(begin, end))
    assert used == drawn
    # No span waits for ever: all but the last draws are used up.
    assert len(state.open) <= OPEN_SPANS


def test_epochs_are_shuffled_differently_and_by_the_seed(dataset):
    def order(seed, pieces):
        one = loader(dataset, rows_per_step=1, row_units=None, units=ByteUnits(), seed=seed)
        found = []
        while len(found) < pieces:
            found += [(s.document, s.begin // 64) for s in one._fill(0).spans if not s.begin % 64]
        return found[:pieces]

    epoch = len(loader(dataset)._components[0])
    twice = order(1, 2 * epoch)
    assert sorted(twice[:epoch]) == sorted(twice[epoch:])
    assert twice[:epoch] != twice[epoch:]
    assert order(2, epoch) != order(1, epoch) == twice[:epoch]


@pytest.mark.parametrize("packing", ["in-order", "balanced"])
def test_rows_keep_to_both_budgets_and_one_of_them_is_used_up(dataset, packing):
    one = loader(dataset, packing=packing)
    for _ in range(20):
        batch = one.next_batch()
        assert batch.ids.shape == (6, 64)
        assert batch.next_boundary is not None
        patches = build_patches(batch.next_boundary, batch.documents)
        assert torch.equal(patches.counts, batch.unit_counts)
        used = (batch.documents >= 0).sum(1)
        assert ((used == 64) | (batch.unit_counts == 20)).all()
        assert (batch.unit_counts <= 20).all()
        assert torch.equal(batch.targets == IGNORED, batch.documents < 0)


@st.composite
def spans_and_room(draw):
    """Patches in the beginnings of some spans, and the room of a row."""
    starts = st.lists(st.booleans(), max_size=12).map(lambda b: [0, *accumulate([1, *b])])
    counts = [np.array(one, np.int32) for one in draw(st.lists(starts, min_size=1, max_size=4))]
    return counts, draw(st.integers(1, 14)), draw(st.integers(1, 14))


@given(spans_and_room())
def test_the_best_cut_is_the_best_of_all(case):
    counts, room, room_units = case
    first, *others = counts
    cuts = [
        (abs(first[k] + other[room - k] - room_units), -max(k, room - k))
        for other in others
        for k in range(1, len(first))
        if 1 <= room - k < len(other)
    ]
    if len(first) > room:
        cuts.append((abs(first[room] - room_units), -room))
    found = best_cut(counts, room, room_units)
    if not cuts:
        assert found is None
        return
    assert found is not None
    assert (found.misfit, -max(found.length, room - found.length)) == min(cuts)
    rest = 0 if found.partner is None else counts[found.partner][room - found.length]
    assert found.misfit == abs(first[found.length] + rest - room_units)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Documents of long words, of short words, and of both."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(1)
    lines = []
    for number in range(90):
        lengths = rng.integers(*((1, 4), (4, 12), (1, 12))[number % 3], size=rng.integers(9, 200))
        lines.append(json.dumps({"text": " ".join("x" * int(n) for n in lengths)}))
    (folder / "x.jsonl").write_text("\n".join(lines))
    prepare([str(folder / "x.jsonl")], folder / "d", PrepareOptions(validation_share=0.0))
    return Dataset(folder / "d", "train")


def test_balanced_rows_are_hardly_padded(mixed, whole_samples):
    padded = {}
    recipe = parse(Recipe, {**SPACE_BLT, "train": {"steps": 1}}, "test")
    units = PatchUnits(build_patcher(recipe.patching))
    for packing in ("in-order", "balanced"):
        data = recipe.data.model_copy(update={"packing": packing, "row_bytes": 256})
        resolved, _ = resolve(recipe.model_copy(update={"data": data}), mixed)
        one = load_rows(resolved, mixed, units)
        batches = [one.next_batch() for _ in range(60)]
        rows, room = 60 * 2, resolved.data.row_patches
        num_bytes = sum(int(batch.byte_counts.sum()) for batch in batches)
        num_units = sum(int(batch.unit_counts.sum()) for batch in batches)
        padded[packing] = 1 - num_bytes / (rows * 256), 1 - num_units / (rows * room)
    assert sum(padded["in-order"]) > 0.1
    assert max(padded["balanced"]) < 0.02


@pytest.mark.parametrize("packing", ["in-order", "balanced"])
def test_spans_that_are_patched_together_make_the_rows_of_spans_patched_alone(
    mixed, packing, monkeypatch
):
    monkeypatch.setattr("bytelm.data.loader.PATCHED_TOGETHER", 150)
    patcher = Patcher(SpaceRule(), max_length=5)
    ours, alone = (loader(mixed, packing=packing, units=PatchUnits(patcher)) for _ in "ab")
    alone._patch_ahead = lambda: None
    for _ in range(8):
        assert equal(ours.next_batch(), alone.next_batch())
    in_progress = {rest for state in ours._streams.values() for rest in state.open}
    assert ours._spans.keys() | ours._boundaries.keys() <= in_progress
    streams = json.loads(json.dumps(ours.state().streams))
    ours = loader(mixed, packing=packing, units=PatchUnits(patcher))
    ours.restore(LoaderState(8, streams))
    assert equal(ours.next_batch(), alone.next_batch())


def test_targets_are_the_next_ids_of_the_same_document(dataset):
    batch = loader(dataset).next_batch()
    inside = batch.documents[:, 1:] == batch.documents[:, :-1]
    inside &= batch.documents[:, 1:] >= 0
    assert torch.equal(batch.targets[:, :-1][inside], batch.ids[:, 1:][inside])
    assert (batch.targets != codec.BOS).all()


@given(st.integers(1, 20), st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_a_packed_row_holds_patches_of_its_spans_alone(max_patches, max_bytes, sizes):
    rng = np.random.default_rng(sum(sizes))
    units = PatchUnits(Patcher(EntropyRule(threshold=0.5)))
    row = Row(max_bytes, max_patches, units)
    for number, size in enumerate(sizes):
        if row.is_full:
            break
        ids = codec.encode(rng.bytes(size), eos=True)
        taken = row.add(Span(number, 0, ids, rng.random(size + 1, dtype=np.float32)))
        assert 1 <= taken <= size + 1
    batch = make_batch([row])
    assert batch.next_boundary is not None
    patches = build_patches(batch.next_boundary, batch.documents, batch.budget)
    assert patches.counts.item() == row.num_units <= max_patches
    for number, span in enumerate(row.spans):
        own = batch.next_boundary[0][batch.documents[0] == number].numpy()
        assert np.array_equal(own, units.segment(span).next_boundary)


def test_a_mixture_sets_the_share_of_bytes(dataset):
    shares = {"alpha": 1.0, "beta": 2.0, "gamma": 5.0}
    one = loader(dataset, mixture=shares, row_units=None, units=ByteUnits(), rows_per_step=4)
    seen = Counter()
    for _ in range(400):
        for r in range(4):
            for span in one._fill(r).spans:
                source = dataset.source_names[dataset.source_ids[span.document]]
                seen[source] += span.num_positions
    total = seen.total()
    for name, share in shares.items():
        assert seen[name] / total == pytest.approx(share / 8, rel=0.1)


def test_bad_requests_are_named(dataset, tmp_path):
    with pytest.raises(
        DataError, match="names 'delta', which is not one of the sources alpha, beta"
    ):
        loader(dataset, mixture={"delta": 1.0})
    with pytest.raises(DataError, match="has no entropies, which the patching rule needs"):
        loader(dataset, units=PatchUnits(Patcher(EntropyRule(threshold=1.0))))
    with pytest.raises(DataError, match="has 6 rows a step, not 4"):
        loader(dataset, rows_per_step=4).restore(loader(dataset).state())
    with pytest.raises(DataError, match="6 rows a step cannot be shared by 8 ranks"):
        loader(dataset, world_size=8, rank=7)
    (tmp_path / "a.txt").write_text("x")
    prepare([str(tmp_path / "a.txt")], tmp_path / "d", PrepareOptions(validation_share=0.9999))
    with pytest.raises(DataError, match="holds no training documents"):
        loader(Dataset(tmp_path / "d", "train"))


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 9])
def test_micro_batches_are_the_rows_in_order(dataset, rows):
    batch = loader(dataset).next_batch()
    parts = batch.split(rows)
    assert [len(p.ids) for p in parts[:-1]] == [rows] * (len(parts) - 1)
    assert [row for part in parts for row in rows_of(part)] == rows_of(batch)
    assert all(part.budget == batch.budget for part in parts)
