"""Cross-entropy of a large vocabulary without all logits in memory at once.

The logits of a vocabulary of 32,768 tokens take 128 KiB per position in fp32, and cross-entropy and
its gradient as much again. So they are computed chunk by chunk, and again in the backward pass,
which costs one more product with the output matrix. ::

    states   | chunk 0 | chunk 1 | chunk 2 |      logits of one chunk exist at a time
    nats     | chunk 0 | chunk 1 | chunk 2 |

``torch.nn.functional.linear_cross_entropy`` computes gradients in its forward pass, so it needs the
mean or sum of all positions; here the caller weights each.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

Logits = Callable[[Tensor], Tensor]
"""States, ``[batch, ids, dim]``, to the logits that are computed from them."""


def reference_target_nats(
    logits: Logits, states: Float[Tensor, "batch ids dim"], targets: Int[Tensor, "batch ids"]
) -> Float[Tensor, "batch ids"]:
    """Return the negative log-likelihood of each target, in nats; 0 where it is -100."""
    flat = functional.cross_entropy(
        logits(states).flatten(0, 1), targets.flatten(), reduction="none"
    )
    return flat.unflatten(0, targets.shape)


def target_nats(
    logits: Logits,
    states: Float[Tensor, "batch ids dim"],
    targets: Int[Tensor, "batch ids"],
    *,
    chunk: int,
) -> Float[Tensor, "batch ids"]:
    """Return the same as :func:`reference_target_nats`, with the logits of one chunk at a time.

    Args:
        logits: function of the states of any number of positions, called again in the backward
            pass.
        states: states of the last block.
        targets: id after each, or -100.
        chunk: number of positions in a chunk.
    """
    parts = [
        checkpoint(
            reference_target_nats,
            logits,
            *some,
            use_reentrant=False,
            # Nothing in it is random.
            preserve_rng_state=False,
        )
        for some in zip(
            states.flatten(0, 1)[None].split(chunk, 1),
            targets.flatten()[None].split(chunk, 1),
            strict=True,
        )
    ]
    return torch.cat(parts, 1).view(targets.shape)
