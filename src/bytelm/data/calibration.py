"""Calibration on prepared data, with a report per source."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bytelm.config import CalibratedConfig, PatchingConfig
from bytelm.data.dataset import Calibration, Dataset, SourceReport, write_manifest
from bytelm.data.loader import Pieces
from bytelm.errors import DataError
from bytelm.patching import PatchSample, calibrate, patch_statistics
from bytelm.tokens import Tokenizer, train_tokenizer

SAMPLE_BYTES = 4_000_000
REPORT_BYTES = 500_000
"""Of each source, for its report."""
_PIECE_BYTES = 16_384


Sample = dict[str, list[tuple[Tensor, Tensor | None]]]
"""(ids, entropies) pairs by source."""


def sample_dataset(
    dataset: Dataset, max_bytes: int = SAMPLE_BYTES, seed: int = 0, source: str | None = None
) -> Sample:
    """Random pieces of documents, with entropies where there are any; the same ones every time.

    Args:
        dataset: what to sample.
        max_bytes: about how much.
        seed: of the choice.
        source: the only source to sample, or all in proportion.

    Raises:
        DataError: the data has no documents.
    """
    if not len(dataset):
        raise DataError(f"{dataset.folder} holds no training documents")
    documents = np.arange(len(dataset))
    if source is not None:
        documents = np.flatnonzero(dataset.source_ids == dataset.source_names.index(source))
    pieces = Pieces(dataset.lengths, documents, _PIECE_BYTES)
    sample: Sample = {}
    taken = 0
    for index in range(len(pieces)):
        document, number = pieces.at(index, [seed])
        begin = number * _PIECE_BYTES
        end = min(begin + _PIECE_BYTES, int(dataset.lengths[document]) + 1)
        ids = torch.from_numpy(dataset.ids(document, begin, end))
        entropies = None
        if dataset.has_entropies:
            entropies = torch.from_numpy(dataset.entropies(document, begin, end))
        name = dataset.source_names[dataset.source_ids[document]]
        sample.setdefault(name, []).append((ids, entropies))
        taken += end - begin
        if taken >= max_bytes:
            break
    return sample


def calibrate_sample(config: PatchingConfig, sample: Sample, patch_size: float) -> CalibratedConfig:
    """Calibrate a rule on a sample of all sources together.

    Raises:
        PatchingError: as :func:`bytelm.patching.calibrate`.
    """
    return calibrate(config, _join(sample), patch_size)


def mean_patch_size(config: PatchingConfig, sample: Sample) -> float:
    """Mean bytes per patch of a sample of all sources together."""
    return patch_statistics(config, _join(sample)).mean_size


def train_dataset_tokenizer(dataset: Dataset, vocab_size: int, max_bytes: int) -> Tokenizer:
    """Byte-pair merges of a sample of the training text, the same ones every time.

    Raises:
        ConfigError: ``vocab_size`` is below 260.
        DataError: there is too little text for so many merges.
    """
    if not len(dataset):
        raise DataError(f"{dataset.folder} holds no training documents")
    pieces = Pieces(dataset.lengths, np.arange(len(dataset)), _PIECE_BYTES)
    texts, taken = [], 0
    for index in range(len(pieces)):
        document, number = pieces.at(index, [0])
        begin = number * _PIECE_BYTES
        text = dataset.document(document)[begin : begin + _PIECE_BYTES]
        texts.append(text)
        taken += len(text)
        if taken >= max_bytes:
            break
    return train_tokenizer(texts, vocab_size)


def mean_token_bytes(tokenizer: Tokenizer, sample: Sample) -> float:
    """Mean byte ids per token of a sample of all sources together."""
    documents = [ids.numpy() for documents in sample.values() for ids, _ in documents]
    num_tokens = sum(len(tokenizer.encode(ids)) for ids in documents)
    return sum(map(len, documents)) / num_tokens


def _source_reports(config: PatchingConfig, dataset: Dataset) -> dict[str, SourceReport]:
    """Patches of each source, however little there is of it."""
    reports = {}
    for number in np.unique(dataset.source_ids):
        name = dataset.source_names[number]
        statistics = patch_statistics(
            config, _join(sample_dataset(dataset, REPORT_BYTES, source=name))
        )
        reports[name] = SourceReport(
            sampled_bytes=statistics.num_positions,
            patches=statistics.num_patches,
            patch_size=statistics.mean_size,
            longest=statistics.longest,
        )
    return reports


def _join(sample: Sample) -> PatchSample:
    return PatchSample.join([document for documents in sample.values() for document in documents])


def calibrate_folder(folder: Path, config: PatchingConfig, patch_size: float) -> Calibration:
    """Calibrate a rule on a prepared folder and record it, with its report, in the manifest.

    Raises:
        DataError: the folder is not prepared data, is damaged, or has no entropies.
        PatchingError: as :func:`bytelm.patching.calibrate`.
    """
    dataset = Dataset(folder, "train")
    if not dataset.has_entropies:
        raise DataError(f"{folder} has no entropies to calibrate on: prepare it with --scorer")
    sample = sample_dataset(dataset)
    rule = calibrate_sample(config, sample, patch_size)
    calibration = Calibration(
        rule=rule.model_dump(mode="json"),
        patch_size=mean_patch_size(rule, sample),
        sources=_source_reports(rule, dataset),
    )
    write_manifest(folder, dataset.manifest.model_copy(update={"calibration": calibration}))
    return calibration
