"""Embeddings of ids with hash n-grams (paper section 3.2.1 and appendix C)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from bytelm import codec
from bytelm.config import NgramEmbeddingConfig

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
    """Rolling polynomial hashes of the n-grams that end at each id, modulo 2^64.

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


def _last_hashes(ids: Sequence[int], sizes: Sequence[int], prime: int) -> list[int]:
    """:func:`ngram_hashes` at the last of a document's ids, by integers."""
    by_size = {}
    running = 0
    for n in range(1, max(sizes) + 1):
        oldest = ids[-n] if n <= len(ids) else codec.BOE
        running = (oldest + running * prime) % 2**64
        by_size[n] = running
    return [by_size[n] - 2**64 * (by_size[n] >= 2**63) for n in sizes]


class NgramEmbedding(nn.Module):
    """The embedding of each id plus those of the hashed n-grams that end at it.

    ::

        e[i] = E[ids[i]] + sum_{n, f} E_{n,f}[hash_{n,f}(ids[i-n+1..i]) mod rows]

    and, with ``combine="mean"``, divided by the number of terms as in the paper (equation 4); the
    released checkpoints do not divide. All n-gram tables are one matrix: table ``t``, functions
    outermost, holds rows ``t * rows`` and up. N-grams never reach before the document's start.
    The paper's are of bytes; the same tables serve a model of tokens.
    """

    def __init__(self, *, vocab_size: int, dim: int, config: NgramEmbeddingConfig | None) -> None:
        super().__init__()
        config = config or NgramEmbeddingConfig(sizes=())
        self.ngram_sizes = config.sizes
        self.ngram_rows = config.rows
        self.ngram_functions = config.functions
        num_tables = len(config.sizes) * config.functions
        self.scale = 1.0 / (1 + num_tables) if config.combine == "mean" else 1.0
        self.ids = nn.Embedding(vocab_size, dim)
        self.ngrams = nn.Embedding(num_tables * config.rows, dim) if num_tables else None

    @property
    def context(self) -> int:
        """Ids before one that its embedding depends on."""
        return max(self.ngram_sizes, default=1) - 1

    def stream(self) -> "EmbeddingStream":
        """Embed one document as it arrives."""
        return EmbeddingStream(self)

    def forward(
        self, ids: Int[Tensor, "batch bytes"], positions: Int[Tensor, "batch bytes"]
    ) -> Float[Tensor, "batch bytes dim"]:
        embedded = self.ids(ids)
        if self.ngrams is None:
            return embedded
        rows = self.ngram_indices(ids, positions)
        grams = functional.embedding_bag(rows.flatten(0, 1), self.ngrams.weight, mode="sum")
        return (embedded + grams.unflatten(0, ids.shape)) * self.scale

    def embed_last(self, ids: Sequence[int]) -> Float[Tensor, "1 1 dim"]:
        """Embedding of the last of a document's ids, given those that its n-grams reach back to.

        The same rows as :meth:`forward` finds, by integers in place of dozens of tensors.
        """
        weight = self.ids.weight
        embedded = weight[ids[-1]]
        if self.ngrams is not None:
            primes = PRIMES[: self.ngram_functions]
            hashes = [h for prime in primes for h in _last_hashes(ids, self.ngram_sizes, prime)]
            rows = [h % self.ngram_rows + t * self.ngram_rows for t, h in enumerate(hashes)]
            grams = self.ngrams.weight.index_select(0, torch.tensor(rows, device=weight.device))
            embedded = (embedded + grams.sum(0)).mul_(self.scale)
        return embedded[None, None]

    def ngram_indices(
        self, ids: Int[Tensor, "batch bytes"], positions: Int[Tensor, "batch bytes"]
    ) -> Int[Tensor, "batch bytes tables"]:
        """Row of the n-gram matrix for each id and table."""
        hashes = torch.cat(
            [
                ngram_hashes(ids, positions, self.ngram_sizes, prime)
                for prime in PRIMES[: self.ngram_functions]
            ],
            dim=-1,
        )
        tables = torch.arange(hashes.shape[-1], device=ids.device)
        return hashes % self.ngram_rows + tables * self.ngram_rows


class EmbeddingStream:
    """A :class:`NgramEmbedding` at work on one document: n-grams reach back into older ids."""

    def __init__(self, embedding: NgramEmbedding) -> None:
        self._embedding = embedding
        self._recent: list[int] = []
        self._position = 0

    def clear(self) -> None:
        """Start a new document."""
        self._recent, self._position = [], 0

    def feed(self, ids: Int[Tensor, " bytes"]) -> Float[Tensor, "1 bytes dim"]:
        """Embeddings of the document's next ids."""
        if self._embedding.ngrams is None:
            return self._embedding.ids(ids)[None]
        num_recent = len(self._recent)
        joined = torch.cat((ids.new_tensor(self._recent), ids))
        first = self._position - num_recent
        positions = torch.arange(first, first + len(joined), device=ids.device)
        self._remember(joined[-self._embedding.context - 1 :].tolist(), len(ids))
        return self._embedding(joined[None], positions[None])[:, num_recent:]

    def take(self, new_id: int) -> list[int]:
        """The document's next id, after those before it that its embedding depends on.

        For :meth:`NgramEmbedding.embed_last`, in place of :meth:`feed`.
        """
        ids = [*self._recent, new_id]
        self._remember(ids, 1)
        return ids

    def _remember(self, ids: list[int], num_new: int) -> None:
        """Keep the last ids that later n-grams reach back to."""
        self._recent = ids[max(len(ids) - self._embedding.context, 0) :]
        self._position += num_new
