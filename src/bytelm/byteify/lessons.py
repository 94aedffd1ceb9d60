"""What a student learns from a donor's readings: rows of documents with targets at every byte.

The donor's tokens end where the student's patches do, a byte before (:mod:`.boundaries`). What the
donor predicts at each byte is what the student learns there: the next byte of the token if it goes
on, the first byte of the next token if it has ended. Which of the two, only later bytes tell, so
the student learns how often each happens. The donor's state after a token is the latent of the
patch that ends with the byte after it::

    bytes       t h e _ c a t _ s a t
    tokens     |- - -|- - - -|- - - -|
    states             1       2             after the tokens "the" and "_cat"
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.byteify.boundaries import Divided, known_ends
from bytelm.byteify.cache import CachedDocument, read_shard
from bytelm.byteify.donor import Donor
from bytelm.byteify.teacher import END, Vocabulary
from bytelm.lm import PatchedLM
from bytelm.patching import row_positions
from bytelm.scoring import group_by_size


class Lesson(NamedTuple):
    """A row of documents, and what the donor knows of it."""

    ids: Int[Tensor, "1 ids"]
    documents: Int[Tensor, "1 ids"]
    token_ends: Bool[Tensor, "1 ids"]
    """Whether it is known with each id that a token has ended: with BOS, and with the byte after
    each token."""
    patch_ends: Bool[Tensor, "1 ids"]
    """Whether one of the student's patches does."""
    tokens: Int[Tensor, "1 tokens"]
    """For each document the token that precedes documents, in the place of BOS, and its tokens but
    for the last one."""
    states: Float[Tensor, "1 tokens dim"]
    """What the donor's head reads after each of them."""
    targets: Float[Tensor, "1 ids vocab"]
    """Distributions of the id after each."""

    @property
    def has_state(self) -> Bool[Tensor, "1 ids"]:
        """Whether the donor has a state for the patch that ends with each id."""
        return self.token_ends & self.patch_ends


class TokenLesson(NamedTuple):
    """A row of documents, and the donor's token that ends with each patch."""

    ids: Int[Tensor, "1 ids"]
    documents: Int[Tensor, "1 ids"]
    patch_ends: Bool[Tensor, "1 ids"]
    """Whether one of the student's patches ends with each id; one does with BOS."""
    tokens: Int[Tensor, " patches"]
    """The last token before the end of every patch that ends."""


class Teacher:
    """Maker of lessons for a student.

    Args:
        donor: the donor.
        vocabulary: its tokens.
        student: the model, whose scorer and rule find its patches.
    """

    def __init__(self, donor: Donor, vocabulary: Vocabulary, student: PatchedLM) -> None:
        self.student = student
        self.embeddings: Tensor = donor.model.get_input_embeddings().weight
        self.norm: Tensor = donor.model.model.norm.weight
        self._vocabulary = vocabulary
        self._first = vocabulary.ends[0]

    def token_lesson(self, group: Sequence[Divided]) -> TokenLesson:
        """Return a lesson for the encoder."""
        ids, documents = _joined([one.ids for one in group])
        ends = patch_ends(self.student, ids, documents)
        cuts = np.flatnonzero(ends[0].numpy() | np.concatenate([one.is_end for one in group]))
        places = np.flatnonzero(ends[0].numpy())
        before = cuts[np.maximum(np.searchsorted(cuts, places) - 1, 0)]
        values = ids[0].numpy() - codec.OFFSET
        tokens = []
        for begin, end in zip(before.tolist(), places.tolist(), strict=True):
            # A token ends a byte before its patch; with BOS, what the donor reads before documents.
            start = begin + (values[begin] < 0)
            is_bos = values[end] < 0 or start == end
            data = b"" if is_bos else bytes(values[start:end].tolist())
            tokens.append(self._vocabulary.spell(data)[-1] if data else self._first)
        return TokenLesson(ids, documents, ends, torch.tensor(tokens))

    def lesson(self, group: Sequence[CachedDocument]) -> Lesson:
        """Return the lesson of some documents."""
        ids, documents = _joined([torch.from_numpy(codec.encode(one.data)) for one in group])
        lengths = self._vocabulary.tokens
        ends = [known_ends([len(lengths[token]) for token in one.tokens]) for one in group]
        return Lesson(
            ids,
            documents,
            torch.from_numpy(np.concatenate(ends))[None],
            patch_ends(self.student, ids, documents),
            torch.tensor([[token for one in group for token in (self._first, *one.tokens[:-1])]]),
            torch.cat([one.states[: len(one.tokens)] for one in group])[None].float(),
            _over_ids(torch.cat([one.next for one in group])[None]),
        )


def _joined(documents: Sequence[Tensor]) -> tuple[Int[Tensor, "1 ids"], Int[Tensor, "1 ids"]]:
    """Return documents as a row, and the number of the document of each id."""
    sizes = torch.tensor([len(ids) for ids in documents])
    return torch.cat(list(documents))[None], torch.arange(len(sizes)).repeat_interleave(sizes)[None]


@torch.no_grad()
def patch_ends(
    student: PatchedLM, ids: Int[Tensor, "1 ids"], documents: Int[Tensor, "1 ids"]
) -> Bool[Tensor, "1 ids"]:
    """Return whether one of the student's patches ends with each id of documents; BOS is one."""
    scores = None if student.scorer is None else student.scorer.entropies(ids, documents)
    return student.patcher.next_boundary(ids, scores, documents) | (row_positions(documents) == 0)


def _over_ids(distributions: Float[Tensor, "1 ids 257"]) -> Float[Tensor, "1 ids vocab"]:
    """Return distributions of bytes and the end as distributions of ids."""
    over = torch.zeros(*distributions.shape[:-1], codec.VOCAB_SIZE)
    over[..., codec.OFFSET :] = distributions[..., :END]
    over[..., codec.EOS] = distributions[..., END]
    return over


def groups(shards: Sequence[Path], row_bytes: int, seed: int) -> Iterator[list[CachedDocument]]:
    """Yield the documents of rows, without end: every pass over the shards in another order.

    Args:
        shards: shards of a cache.
        row_bytes: most bytes of a row, unless a document is longer.
        seed: seed of the order.
    """
    shuffled = _shuffler(seed)
    while True:
        for number in shuffled(len(shards)):
            documents = read_shard(shards[number])
            order = [documents[n] for n in shuffled(len(documents)) if documents[n].data]
            yield from group_by_size(order, lambda one: 1 + len(one.data), row_bytes)


def text_groups(text: Sequence[Divided], row_bytes: int, seed: int) -> Iterator[list[Divided]]:
    """Yield documents of rows without readings, as :func:`groups` does."""
    shuffled = _shuffler(seed)
    while True:
        order = [text[n] for n in shuffled(len(text))]
        yield from group_by_size(order, lambda one: len(one.ids), row_bytes)


def _shuffler(seed: int) -> Callable[[int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return lambda size: torch.randperm(size, generator=generator).tolist()


def donor_latents(
    lesson: Lesson, norm: Float[Tensor, " dim"]
) -> tuple[Float[Tensor, "1 tokens dim"], Int[Tensor, "1 ids"]]:
    """Return the donor's states as latents, and which of them each byte reads.

    A state after the final norm is ``g h / rms(h)``. The decoder normalises what it reads of a
    latent, so ``h / rms(h)`` and ``h`` are the same to it.

    Args:
        lesson: the lesson.
        norm: weights ``g`` of the donor's final norm.
    """
    latents = torch.where(norm == 0, 0.0, lesson.states / norm)
    # Tokens are numbered along the row, and a state can be read with the first id of a document.
    numbers = lesson.token_ends.cumsum(1) - 1
    reads = torch.where(lesson.has_state, numbers, 0).cummax(1).values
    return latents, reads
