"""What a student learns from a donor's readings: rows of documents with targets at every byte.

The donor's tokens are not the student's patches. Whether a token ends depends on later bytes, and
the student's boundaries must not. So there are four kinds of bytes, and two distributions of the
next byte that the donor knows of: ``next``, for the tokens of the text, and ``longer``, as if the
token had gone on at its end::

    token ends   patch ends   target                                latent while parts are taught
    yes          yes          ends * next + (1 - ends) * longer     the donor's state after it
    yes          no           next                                  an earlier one
    no           no           next                                  an earlier one
    no           yes          the byte of the text                  none: left out

The first target is what the donor expects if it does not know whether the token ends. The two
below are samples of it, since the student cannot tell these bytes apart. At the last kind the donor
has no state, since no token ends there.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm import codec
from bytelm.byteify.boundaries import Divided, token_ends
from bytelm.byteify.cache import CachedDocument, read_shard
from bytelm.byteify.donor import Donor
from bytelm.byteify.teacher import END, Vocabulary
from bytelm.lm import PatchedLM
from bytelm.patching import build_patches, row_positions
from bytelm.scoring import group_by_size


class Lesson(NamedTuple):
    """A row of documents, and what the donor knows of it."""

    ids: Int[Tensor, "1 ids"]
    documents: Int[Tensor, "1 ids"]
    token_ends: Bool[Tensor, "1 ids"]
    """Whether a token ends with each id; one does with BOS."""
    patch_ends: Bool[Tensor, "1 ids"]
    """Whether one of the student's patches does."""
    tokens: Int[Tensor, "1 tokens"]
    """For each document the token that precedes documents, in the place of BOS, and its tokens."""
    states: Float[Tensor, "1 tokens dim"]
    """What the donor's head reads after each of them."""
    targets: Float[Tensor, "1 ids vocab"]
    """Distributions of the id after each."""

    @property
    def has_state(self) -> Bool[Tensor, "1 ids"]:
        """Whether the donor has a state for the patch that ends with each id."""
        return self.token_ends & self.patch_ends

    @property
    def is_taught(self) -> Bool[Tensor, "1 ids"]:
        """Whether the donor has a target for the student at each id."""
        return self.token_ends | ~self.patch_ends


class TokenLesson(NamedTuple):
    """A row of documents, and the donor's token that ends with each patch."""

    ids: Int[Tensor, "1 ids"]
    documents: Int[Tensor, "1 ids"]
    patch_ends: Bool[Tensor, "1 ids"]
    """Whether one of the student's patches ends with each id; one does with BOS."""
    tokens: Int[Tensor, " patches"]
    """The last token of every patch that ends, if tokens end where patches do."""


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

    def token_lesson(self, group: Sequence[Divided]) -> TokenLesson:
        """Return a lesson for the encoder."""
        ids, documents = _joined([one.ids for one in group])
        ends = patch_ends(self.student, ids, documents)
        cuts = np.flatnonzero(ends[0].numpy() | np.concatenate([one.is_end for one in group]))
        places = np.flatnonzero(ends[0].numpy())
        before = cuts[np.maximum(np.searchsorted(cuts, places) - 1, 0)]
        values = ids[0].numpy() - codec.OFFSET
        tokens = [
            # With BOS ends what the donor reads before a document.
            self._vocabulary.spell(bytes(values[begin + 1 : end + 1].tolist()))[-1]
            if values[end] >= 0
            else self._vocabulary.ends[0]
            for begin, end in zip(before.tolist(), places.tolist(), strict=True)
        ]
        return TokenLesson(ids, documents, ends, torch.tensor(tokens))

    def lesson(self, group: Sequence[CachedDocument]) -> Lesson:
        """Return the lesson of some documents."""
        ids, documents = _joined([torch.from_numpy(codec.encode(one.data)) for one in group])
        lengths = self._vocabulary.tokens
        ends = [token_ends([len(lengths[token]) for token in one.tokens]) for one in group]
        is_token_end = torch.from_numpy(np.concatenate(ends))[None]
        is_patch_end = patch_ends(self.student, ids, documents)
        first = self._vocabulary.ends[0]
        tokens = [token for one in group for token in (first, *one.tokens)]
        following = torch.cat([one.next for one in group])[None]
        after_tokens = is_token_end & (row_positions(documents) > 0)
        blends = following.masked_scatter(
            after_tokens[..., None], torch.cat([one.blends for one in group])
        )
        has_state = (is_token_end & is_patch_end)[..., None]
        targets = _over_ids(torch.where(has_state, blends, following))
        actual = torch.nn.functional.one_hot(ids.roll(-1, 1), codec.VOCAB_SIZE).float()
        is_taught = (is_token_end | ~is_patch_end)[..., None]
        return Lesson(
            ids,
            documents,
            is_token_end,
            is_patch_end,
            torch.tensor([tokens]),
            torch.cat([one.states for one in group])[None].float(),
            torch.where(is_taught, targets, actual),
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
    patches = build_patches(lesson.token_ends, lesson.documents)
    # Tokens are numbered along the row, and a state can be read with the first id of a document.
    reads = torch.where(lesson.has_state, patches.encoder_ids, 0).cummax(1).values
    return latents, reads
