"""Statistics of prepared documents by source: sizes, and a histogram of their entropies.

A histogram of all entropies shows about how many patches each threshold gives, without reading the
data; :func:`bytelm.data.calibration.count_patches` reads it, and counts them.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.data.dataset import Manifest, SourceStatistics, open_table, views

BIN = 0.1
"""Width of the bins of histograms, in nats."""
NUM_BINS = 56
"""Bins up to the largest entropy, ln 260."""
_CHUNK = 2**20


def shard_statistics(path: Path) -> dict[str, SourceStatistics]:
    """Return the statistics of the documents in a shard, by source.

    Raises:
        DataError: the file is damaged.
    """
    table = open_table(path)
    has_entropies = "entropies" in table.column_names
    shard = views(table, has_entropies)
    sources = table["source"].to_pylist()
    changes = [i for i in range(1, len(sources)) if sources[i] != sources[i - 1]]
    statistics: dict[str, SourceStatistics] = {}
    # Documents of one source are mostly neighbours.
    for first, end in zip([0, *changes], [*changes, len(sources)], strict=True):
        one = SourceStatistics(
            documents=end - first, text_bytes=int(shard.begins[end] - shard.begins[first])
        )
        if shard.entropies is not None and shard.entropy_begins is not None:
            begins = shard.entropy_begins
            entropies = shard.entropies[begins[first] : begins[end]]
            one = one.model_copy(
                update={
                    "histogram": histogram(entropies).tolist(),
                    "total_entropy": float(entropies.sum(dtype=np.float64)),
                }
            )
        name = sources[first]
        statistics[name] = statistics[name] + one if name in statistics else one
    return statistics


def histogram(entropies: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the number of entropies in each bin of :data:`BIN` nats.

    Returns:
        ``int64[NUM_BINS]``.
    """
    counts = np.zeros(NUM_BINS, np.int64)
    for begin in range(0, len(entropies), _CHUNK):
        bins = (entropies[begin : begin + _CHUNK] / np.float32(BIN)).astype(np.int64)
        counts += np.bincount(bins.clip(0, NUM_BINS - 1), minlength=NUM_BINS)
    return counts


def add_up(parts: list[dict[str, SourceStatistics]]) -> dict[str, SourceStatistics]:
    """Return the sums of statistics, by source, sorted."""
    totals: dict[str, SourceStatistics] = {}
    for part in parts:
        for name, one in part.items():
            totals[name] = totals[name] + one if name in totals else one
    return dict(sorted(totals.items()))


def folder_statistics(folder: Path, manifest: Manifest) -> dict[str, SourceStatistics]:
    """Return the statistics of prepared data: as recorded, or measured in that of earlier versions.

    Raises:
        DataError: a file is damaged.
    """
    if manifest.statistics:
        return manifest.statistics
    return add_up([shard_statistics(folder / shard.file) for shard in manifest.shards])


def bytes_per_patch(statistics: SourceStatistics) -> NDArray[np.float64]:
    """Return the mean bytes per patch if a patch starts wherever an entropy is above a threshold.

    Returns:
        ``float64[NUM_BINS]``, for the thresholds ``0, BIN, 2 * BIN, ...``; infinite if there are no
        patches, NaN if there are no entropies.
    """
    above = np.cumsum(np.array(statistics.histogram, np.float64)[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return above[0] / above


def estimate_patch_size(statistics: SourceStatistics, threshold: float) -> float:
    """Estimate the mean bytes per patch of the entropy rule, without a longest patch.

    ::

        (documents + bytes) / (documents + entropies above the threshold)

    BOS is a patch of its own, hence the documents. Entropies are taken to be spread evenly over the
    bin of the threshold, so the number of those above it is exact at multiples of :data:`BIN` only;
    it also counts the last entropy of a document, which starts no patch, and leaves out the first
    if it is low.

    Args:
        statistics: of documents with entropies.
        threshold: in nats.

    Returns:
        NaN if there are no documents.
    """
    counts = np.array(statistics.histogram, np.float64)
    share_above = np.clip(np.arange(1, NUM_BINS + 1) - threshold / BIN, 0, 1)
    patches = statistics.documents + float(counts @ share_above)
    return (statistics.documents + statistics.text_bytes) / patches if patches else math.nan
