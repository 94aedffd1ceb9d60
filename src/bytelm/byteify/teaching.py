"""Losses of a student that a donor teaches: of its encoder, of both parts, and of the whole.

The global transformer is the donor's and needs no teaching, so at first it is not run at all.

**Encoder**: it learns to make of the bytes of a patch the embedding ``e`` of the token that ends
with it::

    loss = sum |vector - e|^2 / sum |e|^2

**Parts**: the encoder goes on, and the decoder learns to predict the next byte from the donor's own
states::

    loss = the encoder's  +  mean over bytes of -sum_b target[b] ln p[b]

**Together**: the whole model reads its own patches, and learns the same targets.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bytelm.byteify.lessons import Lesson, Teacher, TokenLesson, donor_latents
from bytelm.patching import build_patches

Losses = tuple[Float[Tensor, ""], Float[Tensor, ""]]
"""What is minimised, and the divergence of the student's distributions from the targets, without
gradients; in nats per byte."""


def encoder_loss(teacher: Teacher, lesson: TokenLesson) -> Float[Tensor, ""]:
    """Return the squared error of patch vectors, relative to the embeddings."""
    blt = teacher.student.blt
    patches = build_patches(lesson.patch_ends, lesson.documents)
    states, _ = blt.encode(lesson.ids, patches.documents, patches.positions)
    vectors = blt.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)
    vectors = vectors[0, patches.encoder_ids[lesson.patch_ends]]
    return _error(vectors, teacher.embeddings[lesson.tokens])


def parts_losses(teacher: Teacher, lesson: Lesson) -> Losses:
    """Return the losses of encoder and decoder, where patches and the donor's tokens end together.

    Args:
        teacher: the donor, and the student.
        lesson: a row.
    """
    blt = teacher.student.blt
    patches = build_patches(lesson.patch_ends, lesson.documents)
    states, context = blt.encode(lesson.ids, patches.documents, patches.positions)
    vectors = blt.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)
    token_ids = lesson.token_ends.cumsum(1)[lesson.has_state] - 1
    error = _error(
        vectors[0, patches.encoder_ids[lesson.has_state]],
        teacher.embeddings[lesson.tokens[0, token_ids]],
    )
    latents, reads = donor_latents(lesson, teacher.norm)
    nodes = None
    if blt.vocabulary is not None:
        nodes = blt.vocabulary.walk(lesson.ids, lesson.has_state)
    logits = blt.decode(states[-1], blt.read_latents(latents), reads, context, nodes)
    entropy, divergence = _compared(logits, lesson.targets)
    return error + entropy, divergence


def together_losses(teacher: Teacher, lesson: Lesson) -> Losses:
    """Return the losses of the whole model with its own patches; see :func:`parts_losses`."""
    logits = teacher.student.blt(lesson.ids, build_patches(lesson.patch_ends, lesson.documents))
    return _compared(logits, lesson.targets)


def _error(
    vectors: Float[Tensor, "patches dim"], wanted: Float[Tensor, "patches dim"]
) -> Float[Tensor, ""]:
    return (vectors - wanted).square().sum() / wanted.square().sum()


def _compared(
    logits: Float[Tensor, "1 ids vocab"],
    targets: Float[Tensor, "1 ids vocab"],
) -> Losses:
    """Return mean cross-entropy and divergence from targets."""
    entropy = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    own = torch.special.entr(targets).sum(-1).mean()
    return entropy, (entropy - own).detach()
