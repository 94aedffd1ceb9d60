"""Statistics of prepared data, and documents that are kept once."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from builders import random_byte_lm
from bytelm import codec
from bytelm.checkpoint import save_model
from bytelm.config import (
    EntropyPatching,
    ModelDescription,
    MonotonicPatching,
    TransformerConfig,
)
from bytelm.data import (
    Dataset,
    PrepareOptions,
    ReadOptions,
    calibration,
    preparation,
    prepare,
    writing,
)
from bytelm.data.calibration import repatch_folder
from bytelm.data.dataset import MANIFEST, SourceStatistics, read_manifest
from bytelm.data.splitting import Seen
from bytelm.data.statistics import (
    BIN,
    NUM_BINS,
    bytes_per_patch,
    estimate_patch_size,
    folder_statistics,
    histogram,
)
from bytelm.errors import DataError
from bytelm.patching import (
    EntropyRule,
    Patcher,
    PatchSample,
    build_patcher,
    patch_statistics,
)
from test_engines import all_texts, eager_engine

SMALL = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "window": 6}
ENTROPIES = npst.arrays(np.float32, st.integers(0, 300), elements=st.floats(0, 5.5, width=32))
TEXTS = st.lists(st.integers(0, 15), min_size=1, max_size=60)


@given(entropies=ENTROPIES)
def test_each_entropy_is_counted_in_its_bin(entropies):
    counts = np.zeros(NUM_BINS, np.int64)
    for value in entropies:
        counts[min(int(value / np.float32(BIN)), NUM_BINS - 1)] += 1
    assert np.array_equal(histogram(entropies), counts)


@given(entropies=ENTROPIES.filter(len), number=st.integers(1, 40))
def test_a_histogram_gives_the_number_of_patches_of_any_threshold(entropies, number):
    # Away from the edges of the bins, where rounding decides.
    entropies = np.floor(entropies / BIN).astype(np.float32) * BIN + np.float32(BIN / 2)
    counts = SourceStatistics(histogram=histogram(entropies).tolist())
    patcher = Patcher(EntropyRule(threshold=number * BIN))
    ids = torch.from_numpy(codec.encode(b"x" * (len(entropies) - 1)))
    boundaries = patcher.next_boundary(ids[None], torch.from_numpy(entropies)[None])[0]
    # The first two positions may start patches by themselves.
    above = int((entropies > number * BIN).sum())
    assert abs(int(boundaries.sum()) - above) <= 2
    expected = len(entropies) / above if above else np.inf
    assert bytes_per_patch(counts)[number] == pytest.approx(expected)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=9),
    number=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_estimates_of_a_histogram_are_off_by_a_patch_a_document_at_the_edge_of_a_bin(
    lengths, number, seed
):
    rng = np.random.default_rng(seed)
    documents = [
        (np.floor(rng.random(n + 1) * 50) + 0.5).astype(np.float32) * np.float32(BIN)
        for n in lengths
    ]
    counts = histogram(np.concatenate(documents)).tolist()
    known = SourceStatistics(documents=len(lengths), text_bytes=sum(lengths), histogram=counts)
    sample = PatchSample.join(
        [
            (torch.from_numpy(codec.encode(b"x" * n)), torch.from_numpy(one))
            for n, one in zip(lengths, documents, strict=True)
        ]
    )
    exact = patch_statistics(Patcher(EntropyRule(threshold=number * BIN)), sample)
    estimated = exact.num_positions / estimate_patch_size(known, number * BIN)
    assert abs(estimated - exact.num_patches) <= len(lengths) + 1e-6
    above, below = (estimate_patch_size(known, (number + by) * BIN) for by in (0.7, 0.3))
    assert above >= below >= estimate_patch_size(known, number * BIN)


@given(batches=st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9)), max_size=12))
def test_seen_is_a_set(batches):
    seen, reference = Seen(), set()
    for batch in batches:
        expected = []
        for digest in batch:
            expected.append(digest not in reference)
            reference.add(digest)
        assert seen.add(batch) == expected


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer") / "run"
    description = ModelDescription(model=TransformerConfig(**SMALL))
    save_model(folder, random_byte_lm(**SMALL), description)
    return folder


def write_inputs(folder, numbers, per_file=20):
    """Write files of documents, of which those with the same number are copies."""
    paths = []
    for begin in range(0, len(numbers), per_file):
        path = folder / f"part{chr(97 + begin // per_file)}.jsonl"
        lines = [
            json.dumps({"text": f"document {n} " * (1 + n), "lang": f"l{(begin + i) % 3}"})
            for i, n in enumerate(numbers[begin : begin + per_file])
        ]
        path.write_text("\n".join(lines))
        paths.append(str(path))
    return paths


def test_statistics_are_those_of_the_documents(scorer, tmp_path):
    inputs = write_inputs(tmp_path, list(range(12)), per_file=5)
    read = ReadOptions(source_field="lang")
    options = PrepareOptions(
        read=read, scorer=scorer, workers=1, shard_bytes=700, validation_share=0.3
    )
    manifest = prepare(inputs, tmp_path / "d", options)
    expected = {}
    for split in ("train", "validation"):
        dataset = Dataset(tmp_path / "d", split)
        for index in range(len(dataset)):
            name = dataset.source_names[dataset.source_ids[index]]
            length = int(dataset.lengths[index])
            expected.setdefault(name, []).append(dataset.entropies(index, 0, length + 1))
    assert sorted(expected) == sorted(manifest.statistics) == ["l0", "l1", "l2"]
    for name, one in manifest.statistics.items():
        entropies = np.concatenate(expected[name])
        assert one.documents == len(expected[name]) == manifest.sources()[name].documents
        assert one.text_bytes == manifest.sources()[name].text_bytes
        assert one.histogram == histogram(entropies).tolist()
        assert one.mean_entropy == pytest.approx(float(entropies.mean()), rel=1e-6)
    # Data of an earlier version has none: they are measured.
    path = tmp_path / "d" / MANIFEST
    old = json.loads(path.read_text())
    del old["statistics"], old["settings"]["deduplicate"], old["settings"]["device"]
    path.write_text(json.dumps(old))
    measured = folder_statistics(tmp_path / "d", read_manifest(tmp_path / "d"))
    assert [one.histogram for one in measured.values()] == [
        one.histogram for one in manifest.statistics.values()
    ]
    assert prepare(inputs, tmp_path / "d", options).statistics == {}


@pytest.mark.parametrize("rule", [EntropyPatching(), MonotonicPatching(max_length=7)])
def test_patches_are_counted_by_source_in_all_documents(scorer, tmp_path, monkeypatch, rule):
    inputs = write_inputs(tmp_path, list(range(12)), per_file=5)
    options = PrepareOptions(
        read=ReadOptions(source_field="lang"), scorer=scorer, workers=1, validation_share=0.3
    )
    prepare(inputs, tmp_path / "d", options)
    threshold = rule.with_threshold(5.4 if rule.kind == "entropy" else 0.01)
    repatch_folder(tmp_path / "d", threshold)
    patcher, expected = build_patcher(threshold), {}
    for split in ("train", "validation"):
        dataset = Dataset(tmp_path / "d", split)
        for index, length in enumerate(dataset.lengths.tolist()):
            parts = (dataset.ids(index, 0, length + 1), dataset.entropies(index, 0, length + 1))
            boundary = patcher.next_boundary(*(torch.from_numpy(one)[None] for one in parts))[0]
            ends = [0, *(boundary[:-1].nonzero()[:, 0] + 1).tolist(), length + 1]
            name = dataset.source_names[dataset.source_ids[index]]
            expected.setdefault(name, []).extend(np.diff(ends).tolist())
    # More than one group, without a cut in a document.
    monkeypatch.setattr(calibration, "_COUNTED_BYTES", 300)
    counted = calibration.with_counted_patches(tmp_path / "d", read_manifest(tmp_path / "d"))
    assert counted.calibration.sources.keys() == expected.keys()
    for name, one in counted.calibration.sources.items():
        sizes = expected[name]
        assert (one.sampled_bytes, one.patches, one.longest) == (
            sum(sizes),
            len(sizes),
            max(sizes),
        )
        assert one.patch_size == pytest.approx(np.mean(sizes))
        assert 1 < one.patch_size < 100
    every = np.concatenate(list(expected.values()))
    assert counted.calibration.patch_size == pytest.approx(every.mean())


def test_patches_without_a_threshold_are_refused(tmp_path):
    prepare(write_inputs(tmp_path, [1, 2]), tmp_path / "d", PrepareOptions())
    with pytest.raises(DataError, match="has no threshold, so there are no patches to count"):
        calibration.with_counted_patches(tmp_path / "d", read_manifest(tmp_path / "d"))


@settings(max_examples=15)
@given(numbers=TEXTS)
def test_the_first_of_each_document_is_kept(tmp_path_factory, numbers):
    folder = tmp_path_factory.mktemp("copies")
    inputs = write_inputs(folder, numbers, per_file=7)
    options = PrepareOptions(
        read=ReadOptions(source_field="lang"),
        validation=tuple(inputs[-1:]) if len(inputs) > 1 else (),
        validation_share=0.2,
        shard_bytes=200,
        deduplicate=True,
    )
    manifest = prepare(inputs[:-1] or inputs, folder / "d", options)
    # Held-out inputs are read first.
    order = list(range(len(numbers)))
    if len(inputs) > 1:
        begin = 7 * (len(inputs) - 1)
        order = [*order[begin:], *order[:begin]]
    first = {}
    for at in order:
        first.setdefault(numbers[at], f"l{at % 3}")
    assert all_texts(folder / "d") == sorted((f"document {n} " * (1 + n)).encode() for n in first)
    kept = {name: one.documents for name, one in manifest.sources().items()}
    assert kept == {name: list(first.values()).count(name) for name in set(first.values())}
    assert manifest.left_out.duplicate_documents == len(numbers) - len(first)
    for n, name in enumerate(("l0", "l1", "l2")):
        one = manifest.statistics.get(name, SourceStatistics())
        assert one.documents + one.duplicate_documents == len(range(n, len(numbers), 3)) or (
            # Numbers of sources begin again in each file.
            len(inputs) > 1
        )


def test_copies_are_the_same_ones_with_any_engine_and_after_a_stop(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0).integers(0, 60, 120).tolist()
    inputs = write_inputs(tmp_path, numbers)
    options = PrepareOptions(shard_bytes=1000, deduplicate=True)
    whole = prepare(inputs, tmp_path / "whole", options)
    assert whole.left_out.duplicate_documents == 120 - len(set(numbers))
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_engine", lambda options, work: eager_engine(work))
        assert prepare(inputs, tmp_path / "eager", options) == whole
    write, written = writing.Writer.write_block, []

    def fail(self, number, documents, splits):
        if number == 12:
            raise KeyboardInterrupt
        written.append(number)
        return write(self, number, documents, splits)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "write_block", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, tmp_path / "d", options)
    assert len(written) == 12
    assert prepare(inputs, tmp_path / "d", options) == whole
