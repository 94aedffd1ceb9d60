"""Embeddings of ids with hash embeddings of n-grams (paper section 3.2.1 and appendix C)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from bytelm import codec
from bytelm.config import HashEmbeddingConfig

# Ten-digit primes, one per hash function, in the order that released checkpoints use.
PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


def ngram_hashes(
    ids: Int[Tensor, "batch bytes"],
    positions: Int[Tensor, "batch bytes"],
    sizes: Sequence[int],
    prime: int,
) -> Int[Tensor, "batch bytes sizes"]:
    """Return rolling polynomial hashes of the n-grams that end at each id, modulo 2^64.

    For size ``n``, with ids before the document's start taken as 0 (BOE)::

        hash[i] = sum_{k=0}^{n-1} ids[i - n + 1 + k] * prime**k   (signed 64-bit wrap-around)

    so the oldest id has power 0. This is the hash of the released checkpoints; the paper's
    equation 23 gives power 0 to the newest byte.
    """
    by_size = {}
    running = torch.zeros_like(ids)
    for n in range(1, max(sizes) + 1):
        oldest = functional.pad(ids, (n - 1, 0), value=codec.BOE)[:, : ids.shape[1]]
        oldest = torch.where(positions >= n - 1, oldest, codec.BOE)
        running = oldest + running * prime
        by_size[n] = running
    return torch.stack([by_size[n] for n in sizes], -1)


class HashEmbedding(nn.Module):
    """Embedding of each id plus hash embeddings of the n-grams that end at it.

    ::

        e[i] = E[ids[i]] + sum_{n, f} E_{n,f}[hash_{n,f}(ids[i-n+1..i]) mod num_buckets]

    and, with ``combine="mean"``, divided by the number of terms as in the paper (equation 4); the
    released checkpoints do not divide. The embeddings of all sizes ``n`` and hash functions ``f``
    are one matrix: pair ``k``, functions outermost, has the buckets from ``k * num_buckets`` on.
    N-grams never reach before the document's start. The paper hashes bytes; tokens work as well.
    """

    def __init__(self, *, vocab_size: int, dim: int, config: HashEmbeddingConfig | None) -> None:
        super().__init__()
        config = config or HashEmbeddingConfig(sizes=())
        self.sizes = config.sizes
        self.num_buckets = config.num_buckets
        self.primes = PRIMES[: config.functions]
        num_hashes = len(config.sizes) * config.functions
        self.scale = 1.0 / (1 + num_hashes) if config.combine == "mean" else 1.0
        self.ids = nn.Embedding(vocab_size, dim)
        num_rows = num_hashes * config.num_buckets
        self.ngrams = nn.EmbeddingBag(num_rows, dim, mode="sum") if num_hashes else None

    @property
    def context(self) -> int:
        """Number of preceding ids that an embedding depends on."""
        return max(self.sizes, default=1) - 1

    def forward(
        self, ids: Int[Tensor, "batch bytes"], positions: Int[Tensor, "batch bytes"]
    ) -> Float[Tensor, "batch bytes dim"]:
        embedded = self.ids(ids)
        if self.ngrams is None:
            return embedded
        buckets = self.buckets(ids, positions)
        grams = self.ngrams(buckets.flatten(0, 1))
        return (embedded + grams.unflatten(0, ids.shape)) * self.scale

    def last(self, ids: Int[Tensor, "batch ids"]) -> Float[Tensor, "batch 1 dim"]:
        """Return the embeddings of the last ids, given all ids that these depend on."""
        if self.ngrams is None:
            return self.ids(ids[:, -1:])
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self(ids, positions)[:, -1:]

    def buckets(
        self, ids: Int[Tensor, "batch bytes"], positions: Int[Tensor, "batch bytes"]
    ) -> Int[Tensor, "batch bytes hashes"]:
        """Return the buckets, as rows of the embedding matrix, that each id reads."""
        hashes = torch.cat(
            [ngram_hashes(ids, positions, self.sizes, prime) for prime in self.primes], dim=-1
        )
        offsets = torch.arange(hashes.shape[-1], device=ids.device) * self.num_buckets
        return hashes % self.num_buckets + offsets
