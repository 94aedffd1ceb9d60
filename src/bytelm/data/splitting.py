"""Decide which documents are held out, and which are copies.

Whether a document is held out depends on its bytes and on all inputs, not on their order:

* a document that any input holds out is held out;
* else a document that prepared data trains on is trained on;
* else a hash of its bytes decides.

So prepared data keeps its split, and no copy of a held-out document is trained on.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bytelm.data.corpus import cut
from bytelm.data.dataset import Dataset, Split
from bytelm.data.inputs import Input
from bytelm.data.records import Document


class Splitter:
    """Assigns each document to a split.

    Args:
        inputs: all inputs, those that are held out whole first.
        hashed_share: share of the documents, of those in no prepared data, to hold out.
        cut_bytes: as in :class:`~bytelm.data.ReadOptions`.

    Raises:
        DataError: an input that is prepared data is damaged.
    """

    def __init__(self, inputs: Sequence[Input], hashed_share: float, cut_bytes: int | None) -> None:
        self._limit = hashed_share * 2**64
        prepared = [one.path for one in inputs if one.kind == "prepared" and not one.split]
        self._held_out = {
            digest
            for path in prepared
            if path is not None
            for digest in _digests(path, "validation", cut_bytes)
        }
        is_mixed = any(one.kind != "prepared" and not one.split for one in inputs)
        # Only documents whose hash would hold them out need to be known.
        self._trained = {
            digest
            for path in prepared
            if path is not None and is_mixed and hashed_share
            for digest in _digests(path, "train", cut_bytes)
            if digest < self._limit
        }

    def split(self, digest: int, decided: Split | None) -> Split:
        """Return the split of a document.

        Documents of inputs that are held out whole must come first.

        Args:
            digest: hash of the document; see :func:`document_digest`.
            decided: split that its input has decided.
        """
        if decided == "validation":
            self.hold_out([digest])
        if digest in self._held_out:
            return "validation"
        if decided == "train" or digest in self._trained:
            return "train"
        return "validation" if digest < self._limit else "train"

    def hold_out(self, digests: Iterable[int]) -> None:
        """Hold out all later copies of some documents."""
        self._held_out.update(digests)


class Seen:
    """Set of digests that is far smaller than Python's: 8 bytes for each, in sorted arrays.

    Of n different documents, two have the same digest with a probability of about n^2 / 2^65:
    0.03% for a hundred million.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []
        """Sorted arrays, each at least twice as long as the next."""

    def add(self, digests: Sequence[int]) -> list[bool]:
        """Add digests, and return which are new: neither seen before nor earlier in the list."""
        added = np.array(digests, np.uint64)
        is_new = np.zeros(len(added), np.bool_)
        is_new[np.unique(added, return_index=True)[1]] = True
        for run in self._runs:
            at = np.searchsorted(run, added).clip(max=len(run) - 1)
            is_new &= run[at] != added
        if is_new.any():
            self._runs.append(np.sort(added[is_new]))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]))]
        return is_new.tolist()


def _digests(folder: Path, split: Split, cut_bytes: int | None) -> Iterator[int]:
    """Yield the digests of the documents, once cut, of one split of prepared data."""
    dataset = Dataset(folder, split)
    for index in range(len(dataset)):
        for part in cut(Document(dataset.document(index), ""), cut_bytes):
            yield document_digest(part.data)


def document_digest(data: bytes) -> int:
    """Return 64 bits of the SHA-256 of a document."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
