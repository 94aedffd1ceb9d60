"""Calibrate thresholds and train tokenizers on samples of prepared data."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm.config import CalibratedPatching, PatchingConfig
from bytelm.config.rules import named_rule
from bytelm.data.dataset import (
    Calibration,
    Dataset,
    Manifest,
    SourceReport,
    Split,
    write_manifest,
)
from bytelm.data.loader import SpanOrder
from bytelm.errors import DataError
from bytelm.patching import (
    PatchSample,
    PatchStatistics,
    build_patcher,
    calibrate,
    patch_statistics,
)
from bytelm.scoring import check_entropies
from bytelm.tokens import Tokenizer, train_tokenizer

SAMPLE_BYTES = 4_000_000
REPORT_BYTES = 500_000
"""Bytes sampled of each source for its report."""
_SPAN_BYTES = 16_384
_COUNTED_BYTES = 2**20
"""Bytes whose patches are counted at once."""


Sample = dict[str, list[tuple[Tensor, Tensor | None]]]
"""(ids, entropies) pairs by source."""


def sample_dataset(
    dataset: Dataset, max_bytes: int = SAMPLE_BYTES, seed: int = 0, source: str | None = None
) -> Sample:
    """Return a reproducible sample of spans of documents, with entropies if the data has any.

    Args:
        dataset: prepared data.
        max_bytes: approximate size of the sample.
        seed: seed of the sample.
        source: source to sample; ``None`` for all in proportion.

    Raises:
        DataError: the data has no documents.
        NumericalError: an entropy is not finite.
    """
    documents = np.arange(len(dataset))
    if source is not None:
        documents = np.flatnonzero(dataset.source_ids == dataset.source_names.index(source))
    sample: Sample = {}
    for document, begin, end in sample_spans(dataset, documents, max_bytes, seed):
        ids = torch.from_numpy(dataset.ids(document, begin, end))
        entropies = None
        if dataset.has_entropies:
            entropies = torch.from_numpy(dataset.entropies(document, begin, end))
            check_entropies(entropies, f"document {document:,} of {dataset.folder}", begin)
        name = dataset.source_names[dataset.source_ids[document]]
        sample.setdefault(name, []).append((ids, entropies))
    return sample


def sample_spans(
    dataset: Dataset, documents: NDArray[np.int64], max_bytes: int, seed: int = 0
) -> Iterator[tuple[int, int, int]]:
    """Yield (document, begin, end) of reproducible random spans, about ``max_bytes`` in total.

    Raises:
        DataError: the data has no documents.
    """
    if not len(dataset):
        raise DataError(f"{dataset.folder} holds no training documents")
    spans = SpanOrder(dataset.lengths, documents, _SPAN_BYTES)
    taken = 0
    for index in range(len(spans)):
        document, number = spans.at(index, [seed])
        begin = number * _SPAN_BYTES
        end = min(begin + _SPAN_BYTES, int(dataset.lengths[document]) + 1)
        yield document, begin, end
        taken += end - begin
        if taken >= max_bytes:
            return


def calibrate_sample(
    config: PatchingConfig, sample: Sample, patch_size: float
) -> CalibratedPatching:
    """Calibrate a rule on a sample of all sources together.

    Raises:
        PatchingError: as :func:`bytelm.patching.calibrate`.
    """
    return calibrate(config, PatchSample.join(all_documents(sample)), patch_size)


def all_documents(sample: Sample) -> list[tuple[Tensor, Tensor | None]]:
    """Return the documents of all sources together."""
    return [document for documents in sample.values() for document in documents]


def train_dataset_tokenizer(dataset: Dataset, vocab_size: int, max_bytes: int) -> Tokenizer:
    """Train a tokenizer on a reproducible sample of the training text.

    Raises:
        ConfigError: ``vocab_size`` is below 260.
        DataError: the text has too few pairs for so large a vocabulary.
    """
    texts, taken = [], 0
    # Sizes are counted here, since those of spans include BOS.
    for document, begin, _ in sample_spans(dataset, np.arange(len(dataset)), 2**62):
        texts.append(dataset.document(document)[begin : begin + _SPAN_BYTES])
        taken += len(texts[-1])
        if taken >= max_bytes:
            break
    return train_tokenizer(texts, vocab_size)


def _source_reports(config: PatchingConfig, dataset: Dataset) -> dict[str, SourceReport]:
    """Return statistics of the patches of each source, on a sample of its own."""
    patcher = build_patcher(config)
    reports = {}
    for number in np.unique(dataset.source_ids):
        name = dataset.source_names[number]
        sample = sample_dataset(dataset, REPORT_BYTES, source=name)
        sample = PatchSample.join(all_documents(sample))
        reports[name] = _report(patch_statistics(patcher, sample))
    return reports


def _report(statistics: PatchStatistics) -> SourceReport:
    return SourceReport(
        sampled_bytes=statistics.num_positions,
        patches=statistics.num_patches,
        patch_size=statistics.mean_size,
        longest=statistics.longest,
    )


def count_patches(folder: Path, config: PatchingConfig) -> dict[str, SourceReport]:
    """Count the patches of all documents of both splits, by source, from the entropies in the data.

    A document is cut every 2**20 bytes, and a patch starts at the cut.

    Raises:
        DataError: the folder is not prepared data, is damaged, or has no entropies.
        PatchingError: the rule has no threshold.
    """
    patcher = build_patcher(config)
    totals: dict[str, PatchStatistics] = {}
    for split in ("train", "validation"):
        dataset = _with_entropies(folder, split)
        for name, group in _by_source(dataset):
            one = patch_statistics(patcher, PatchSample.join(group))
            totals[name] = totals[name].joined(one) if name in totals else one
    return {name: _report(total) for name, total in sorted(totals.items())}


def with_counted_patches(folder: Path, manifest: Manifest) -> Manifest:
    """Return a manifest whose reports per source are of all documents, not of samples.

    Raises:
        DataError: the data is not calibrated, or as :func:`count_patches`.
    """
    calibration = manifest.calibration
    if calibration is None:
        raise DataError(
            f"{folder} has no threshold, so there are no patches to count: run `bytelm data "
            f"calibrate {folder}` first"
        )
    options: dict[str, Any] = {
        name: value for name, value in calibration.rule.items() if name != "kind"
    }
    rule = named_rule(str(calibration.rule["kind"]), **options)
    sources = count_patches(folder, rule)
    positions = sum(one.sampled_bytes for one in sources.values())
    mean = positions / max(sum(one.patches for one in sources.values()), 1)
    counted = calibration.model_copy(update={"patch_size": mean, "sources": sources})
    return manifest.model_copy(update={"calibration": counted})


def _by_source(dataset: Dataset) -> Iterator[tuple[str, list[tuple[Tensor, Tensor | None]]]]:
    """Yield all spans of documents, a group of one source and about a megabyte at a time."""
    group: list[tuple[Tensor, Tensor | None]] = []
    size, of = 0, 0
    for document, source in enumerate(dataset.source_ids.tolist()):
        length = int(dataset.lengths[document]) + 1
        for begin in range(0, length, _COUNTED_BYTES):
            end = min(begin + _COUNTED_BYTES, length)
            if group and (source != of or size + end - begin > _COUNTED_BYTES):
                yield dataset.source_names[of], group
                group, size = [], 0
            ids, entropies = (
                read(document, begin, end) for read in (dataset.ids, dataset.entropies)
            )
            group.append((torch.from_numpy(ids), torch.from_numpy(entropies)))
            size, of = size + end - begin, source
    if group:
        yield dataset.source_names[of], group


def calibrate_folder(folder: Path, config: PatchingConfig, patch_size: float) -> Calibration:
    """Calibrate a rule on prepared data, and record it in the manifest with a report per source.

    Nothing is scored again: the entropies are in the data.

    Raises:
        DataError: the folder is not prepared data, is damaged, or has no entropies.
        PatchingError: as :func:`bytelm.patching.calibrate`.
    """
    dataset = _with_entropies(folder)
    rule = calibrate_sample(config, sample_dataset(dataset), patch_size)
    return _record(dataset, rule)


def repatch_folder(folder: Path, rule: CalibratedPatching) -> Calibration:
    """Record a rule whose threshold is known in the manifest, with a report per source.

    Raises:
        DataError: as :func:`calibrate_folder`.
        PatchingError: the rule has no threshold.
    """
    return _record(_with_entropies(folder), rule)


def _with_entropies(folder: Path, split: Split = "train") -> Dataset:
    dataset = Dataset(folder, split)
    if not dataset.has_entropies:
        raise DataError(f"{folder} has no entropies to calibrate on: prepare it with --scorer")
    return dataset


def _record(dataset: Dataset, rule: CalibratedPatching) -> Calibration:
    sample = PatchSample.join(all_documents(sample_dataset(dataset)))
    calibration = Calibration(
        rule=rule.model_dump(mode="json"),
        patch_size=patch_statistics(build_patcher(rule), sample).mean_size,
        sources=_source_reports(rule, dataset),
    )
    write_manifest(dataset.folder, dataset.manifest.model_copy(update={"calibration": calibration}))
    return calibration
