"""A donor's blocks as the global transformer of a BLT.

Only the rotary layout changes: `transformers` rotates dimensions ``j`` and ``j + head_dim / 2``
together, ours ``2 j`` and ``2 j + 1``, so the rows of queries and keys are permuted in each head.
For a head of width 6::

    theirs   0 1 2 3 4 5      pairs (0, 3) (1, 4) (2, 5)
    ours     0 3 1 4 2 5      pairs (0, 1) (2, 3) (4, 5)
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.byteify.donor import Donor
from bytelm.checkpoint import check_finite
from bytelm.errors import CheckpointError
from bytelm.model.blt import GlobalTransformer
from bytelm.model.vocabulary import Trie, Vocabulary

_LEAVES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
"""The parts of a donor's block that each part of ours is made of."""
_ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")
TOLERANCE = 1e-3
"""Largest relative error of a layer's output: fp32 stays below 1e-5, an unknown option above 1."""


def interleaved(rows: Float[Tensor, "rows *dim"], head_dim: int) -> Float[Tensor, "rows *dim"]:
    """Return the rows of rotated heads, or of their norms, in the interleaved order."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).reshape(rows.shape)


@torch.no_grad()
def transplant(donor: Donor, blocks: GlobalTransformer) -> None:
    """Copy a donor's blocks into a global transformer of the same shape.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the donor has other weights.
    """
    theirs = dict(donor.model.model.layers.named_parameters())
    for name, parameter in blocks.blocks.named_parameters():
        head, _, kind = name.rpartition(".")
        layer, _, leaf = head.partition(".")
        parts = []
        for part in _LEAVES[leaf]:
            tensor = theirs.pop(f"{layer}.{part}.{kind}")
            check_finite(f"{layer}.{part}.{kind}", tensor, donor.name)
            is_rotated = part.rpartition(".")[2] in _ROTATED
            parts.append(interleaved(tensor, donor.stack.head_width) if is_rotated else tensor)
        parameter.copy_(torch.cat(parts))
    if theirs:
        raise CheckpointError(
            f"{donor.name} has weights that bytelm's blocks lack, such as {min(theirs)}: choose "
            "another donor"
        )


@torch.no_grad()
def transplant_vocabulary(
    donor: Donor, vocabulary: Vocabulary, pieces: Sequence[tuple[bytes, int]], trie: Trie
) -> None:
    """Copy a donor's embeddings, final norm and head into a vocabulary of the same sizes.

    Args:
        donor: the donor.
        vocabulary: the vocabulary.
        pieces: bytes and token of each piece, in order of the bytes.
        trie: from :func:`bytelm.model.vocabulary.build_trie`.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    tokens = torch.tensor([token for _, token in pieces])
    tables = [(vocabulary.embedding.weight, donor.model.get_input_embeddings().weight)]
    if vocabulary.head is not None:
        tables.append((vocabulary.head.weight, donor.model.get_output_embeddings().weight))
    for ours, theirs in tables:
        check_finite("the vocabulary", theirs, donor.name)
        ours.copy_(theirs[tokens])
    vocabulary.norm.weight.copy_(donor.model.model.norm.weight)
    vocabulary.load_state_dict(trie, strict=False)


@torch.no_grad()
def layer_outputs(donor: Donor, tokens: Int[Tensor, "batch tokens"]) -> list[Tensor]:
    """Return the outputs of a donor's layers, without its final norm."""
    outputs: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in donor.model.model.layers]
    try:
        donor.model.model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


@torch.no_grad()
def transplanted_outputs(
    donor: Donor, blocks: GlobalTransformer, tokens: Int[Tensor, "batch tokens"]
) -> list[Tensor]:
    """Return the outputs of the transplanted layers for the embeddings of a donor's tokens."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    context = blocks.spec.over_rows(torch.zeros_like(tokens), positions)
    x = donor.model.get_input_embeddings()(tokens)
    outputs = []
    for layer, block in enumerate(blocks.blocks):
        x = block(x, context[layer])
        outputs.append(x)
    return outputs


def check_layers(
    donor: Donor, blocks: GlobalTransformer, tokens: Int[Tensor, "batch tokens"]
) -> float:
    """Return the largest relative error of a transplanted layer's output, over all positions.

    Raises:
        CheckpointError: it is large, so the donor has an option that bytelm does not know.
    """
    if donor.window is not None:
        tokens = tokens[:, : donor.window]
    errors = []
    theirs = layer_outputs(donor, tokens)
    for ours, wanted in zip(transplanted_outputs(donor, blocks, tokens), theirs, strict=True):
        errors.append(float(((ours - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()))
    wrong = [layer for layer, error in enumerate(errors) if not error < TOLERANCE]
    if wrong:
        raise CheckpointError(
            f"the layers of {donor.name} are not those of its family: layer "
            f"{wrong[0]} has other outputs after the transplant (relative error "
            f"{errors[wrong[0]]:.2g}); choose another donor"
        )
    return max(errors)
