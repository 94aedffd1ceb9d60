"""A scorer of boundaries: the probability that one of the donor's tokens ended before a byte.

Where a token ends depends on the bytes after it: ``the`` may go on to ``then``. Where a patch ends
must not, so a patch ends with the first byte after the token, which tells nearly always. The scorer
tells how often a token ends before the last of some bytes. It counts in text that the donor's
tokenizer has divided; the donor itself reads nothing::

    p_k(c) = (ends(c) + p_{k-1}(c')) / (count(c) + 1)

with ``c`` the last ``k`` ids, ``c'`` the last ``k - 1``, and ``p_0`` the share of all bytes. The
result is an n-gram scorer whose values are these probabilities instead of entropies, so the
``entropy`` rule begins a patch where the probability exceeds its threshold, and every command works
with it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from bytelm import codec
from bytelm.byteify.donor import Donor
from bytelm.byteify.teacher import Vocabulary
from bytelm.config import FittedNgramConfig
from bytelm.patching import row_positions
from bytelm.scoring import NgramScorer
from bytelm.scoring.ngram import context_keys


class Divided(NamedTuple):
    """A document as a donor's tokenizer divides it."""

    ids: Int[Tensor, " ids"]
    """BOS and the bytes."""
    is_end: NDArray[np.bool_]
    """Whether it is known with each id that a token has ended: with BOS, and with the byte after
    each token."""


class BoundaryCounting(NamedTuple):
    """How boundaries are counted."""

    max_order: int = 12
    """Ids of the longest context."""
    min_count: int = 3
    """Times that a context must have been seen."""
    max_contexts: int = 300_000
    """Most contexts of each order; the most frequent ones are kept."""


def divide(donor: Donor, vocabulary: Vocabulary, texts: Iterable[bytes]) -> list[Divided]:
    """Return texts with the ends of their tokens, without those that the tokens do not spell.

    Invalid UTF-8 is left out.
    """
    decoded = [text.decode("utf-8", "ignore") for text in texts]
    divided = []
    for text, encoded in zip(
        decoded, donor.tokenizer.encode_batch(decoded, add_special_tokens=False), strict=True
    ):
        sizes = [len(vocabulary.tokens[token]) for token in encoded.ids]
        data = text.encode()
        if sum(sizes) == len(data) and all(sizes):
            divided.append(Divided(torch.from_numpy(codec.encode(data)), known_ends(sizes)))
    return divided


def known_ends(sizes: Sequence[int]) -> NDArray[np.bool_]:
    """Return whether it is known with each id that a token has ended.

    Args:
        sizes: bytes of each token after BOS. The end of the last one is not known.
    """
    is_known = np.zeros(1 + sum(sizes), bool)
    is_known[0] = True
    is_known[np.cumsum(sizes[:-1], dtype=np.int64) + 1] = True
    return is_known


def fit_boundary_scorer(
    documents: Sequence[Divided], counting: BoundaryCounting
) -> tuple[NgramScorer, FittedNgramConfig]:
    """Return a scorer of boundaries, and its configuration for a checkpoint.

    Args:
        documents: text to count in, at least one byte.
        counting: orders and limits.
    """
    ids = torch.cat([one.ids for one in documents])
    numbers = torch.arange(len(documents)).repeat_interleave(
        torch.tensor([len(one.ids) for one in documents])
    )
    positions = row_positions(numbers[None])[0].numpy()
    is_end = np.concatenate([one.is_end for one in documents])
    share = is_end.mean()
    # Of each id: the estimate of its longest context so far.
    estimates = np.full(len(ids), share)
    all_keys, all_values = [], []
    for order, key in enumerate(context_keys(ids, counting.max_order), start=1):
        valid = np.flatnonzero(positions >= order - 1)
        keys, contexts, counts = np.unique(
            key.numpy()[valid], return_inverse=True, return_counts=True
        )
        ends = np.bincount(contexts, weights=is_end[valid])
        first = np.zeros(len(keys), np.int64)
        first[contexts[::-1]] = valid[::-1]
        values = (ends + estimates[first]) / (counts + 1)
        kept = counts >= counting.min_count
        if kept.sum() > counting.max_contexts:
            kept &= counts >= np.partition(counts, -counting.max_contexts)[-counting.max_contexts]
        all_keys.append(keys[kept])
        all_values.append(values[kept])
        estimates[valid] = np.where(kept[contexts], values[contexts], estimates[valid])
    keys, values = np.concatenate(all_keys), np.concatenate(all_values)
    in_order = np.argsort(keys)
    scorer = NgramScorer(max_order=counting.max_order, num_contexts=len(keys))
    scorer.keys.copy_(torch.from_numpy(keys[in_order]))
    scorer.values.copy_(torch.from_numpy(values[in_order]))
    scorer.default.fill_(float(share))
    return scorer, FittedNgramConfig(max_order=counting.max_order, num_contexts=len(keys))


class Agreement(NamedTuple):
    """Patches compared with a donor's tokens, over the ends of both; documents' ends are left out.

    ::

        precision = common / patch ends    recall = common / token ends
        f1        = 2 precision recall / (precision + recall)
    """

    precision: float
    recall: float
    f1: float
    patch_size: float
    """Mean bytes per patch."""


def agreement(
    documents: Sequence[Divided], next_boundary: Sequence[NDArray[np.bool_]]
) -> Agreement:
    """Return how well patches agree with tokens.

    Args:
        documents: the tokens' ends.
        next_boundary: for each document, whether a patch ends with each id.
    """
    # BOS is a patch of its own, and the last patch ends with the document.
    tokens = np.concatenate([one.is_end[1:-1] for one in documents])
    patches = np.concatenate([one[1:-1] for one in next_boundary])
    common = int((tokens & patches).sum())
    precision, recall = common / max(patches.sum(), 1), common / max(tokens.sum(), 1)
    f1 = 2 * common / max(tokens.sum() + patches.sum(), 1)
    num_bytes = sum(len(one.ids) - 1 for one in documents)
    return Agreement(precision, recall, f1, num_bytes / (patches.sum() + len(documents)))
