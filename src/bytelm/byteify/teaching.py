"""Losses of a student that a donor teaches, in parts and together.

**Parts**: the global transformer is the donor's and needs no teaching, so it is not run at all.
The encoder learns to make of the bytes of a patch the embedding ``e`` of the token that ends with
it, and the decoder to predict the next byte from the donor's own states::

    loss = sum |vector - e|^2 / sum |e|^2  +  mean over bytes of -sum_b target[b] ln p[b]

**Together**: the whole model reads its own patches, and learns the same targets.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bytelm.byteify.lessons import Lesson, Teacher, parts_latents
from bytelm.model.blt import BLT
from bytelm.patching import build_patches


class Losses(NamedTuple):
    """What a lesson is minimised for, and figures of it."""

    entropy: Float[Tensor, ""]
    """Mean cross-entropy of the student's distributions, in nats per byte."""
    divergence: Float[Tensor, ""]
    """Of the student's distributions from the targets, in nats per byte; without gradients."""
    embedding_error: Float[Tensor, ""] | None
    """Squared error of patch vectors, relative to the embeddings, of parts."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """What is minimised."""
        return self.entropy if self.embedding_error is None else self.entropy + self.embedding_error

    def backward(self, blt: BLT) -> None:
        """Add the gradients of the total.

        While parts are taught, hash embeddings learn from the embedding error alone: an n-gram of 8
        bytes occurs once in most texts, so tables that learn to predict learn the text by heart.
        """
        if self.embedding_error is not None:
            self.embedding_error.backward(retain_graph=True)
            ngrams = blt.encoder.embedding.ngrams
            table = None if ngrams is None else ngrams.weight
            others = [one for one in blt.parameters() if one.requires_grad and one is not table]
            self.entropy.backward(inputs=others)
        else:
            self.entropy.backward()


def parts_losses(teacher: Teacher, norm: Float[Tensor, " dim"], lesson: Lesson) -> Losses:
    """Return the losses of encoder and decoder, where patches and the donor's tokens end together.

    Args:
        teacher: the donor, and the student.
        norm: weights of the donor's final norm.
        lesson: a row.
    """
    blt = teacher.student.blt
    patches = build_patches(lesson.patch_ends, lesson.documents)
    states, context = blt.encode(lesson.ids, patches.documents, patches.positions)
    vectors = blt.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)
    vectors = vectors[0, patches.encoder_ids[lesson.has_state]]
    token_ids = lesson.token_ends.cumsum(1)[lesson.has_state] - 1
    wanted = teacher.embeddings[lesson.tokens[0, token_ids]]
    error = (vectors - wanted).square().sum() / wanted.square().sum()
    latents, reads = parts_latents(lesson, norm)
    logits = blt.decoder(states[-1], blt.decoder.read_latents(latents), reads, context)
    entropy, divergence = _compared(logits, lesson.targets, lesson.is_taught)
    return Losses(entropy, divergence, error)


def together_losses(blt: BLT, lesson: Lesson) -> Losses:
    """Return the losses of the whole model with its own patches."""
    logits = blt(lesson.ids, build_patches(lesson.patch_ends, lesson.documents))
    last = torch.ones_like(lesson.token_ends)
    entropy, divergence = _compared(logits, lesson.targets, last)
    return Losses(entropy, divergence, None)


def _compared(
    logits: Float[Tensor, "1 ids vocab"],
    targets: Float[Tensor, "1 ids vocab"],
    counted: Bool[Tensor, "1 ids"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return mean cross-entropy and divergence from targets, in nats, where they count."""
    logits, targets = logits[counted], targets[counted]
    entropy = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    own = torch.special.entr(targets).sum(-1).mean()
    return entropy, (entropy - own).detach()
