"""The plain transformer, used as entropy model and for the byte and token baselines."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import kernels
from bytelm.config import TransformerConfig
from bytelm.model.attention import RMSNorm, StackContext, StackSpec
from bytelm.model.embedding import HashEmbedding
from bytelm.model.layers import Initialisers, build_blocks, stack_initialisers
from bytelm.patching import row_positions

CHUNK_LOGITS = 2**24
"""Logits in memory at once where all positions' would be too many: 64 MiB in fp32."""


def chunk_positions(dim: int, vocab_size: int) -> int:
    """Return the positions whose logits are in memory at once.

    There are at least as many as the matrix of the logits has columns, so that its gradients cost
    no more memory traffic than the logits.
    """
    return max(CHUNK_LOGITS // vocab_size, dim)


class Transformer(nn.Module):
    """Decoder-only transformer: ids in, logits of the next id out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.spec = StackSpec.of(config, config.window)
        self.embedding = HashEmbedding(
            vocab_size=config.vocab_size, dim=config.dim, config=config.hash_embeddings
        )
        self.blocks = build_blocks(config)
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters; see :meth:`initialisers`."""
        for parameter, initialise in self.initialisers(generator):
            initialise(parameter)

    def initialisers(self, generator: torch.Generator | None = None) -> Initialisers:
        """Yield parameters and their initialisation: :func:`stack_initialisers`."""
        return stack_initialisers(self, generator)

    def forward(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
        targets: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes vocab"] | Float[Tensor, "batch bytes"]:
        """Return the logits, in fp32, of the id after each.

        Args:
            ids: packed rows.
            documents: document of each id; ``None`` for one document per row.
            targets: id after each, or -100. If given, the result is the negative log-likelihood of
                each, in nats, computed without all logits in memory at once.
        """
        if documents is None:
            documents = torch.zeros_like(ids)
        positions = row_positions(documents)
        x, context = self.embedding(ids, positions), self.spec.over_rows(documents, positions)
        if targets is None:
            return self.run(x, context)
        chunk = chunk_positions(self.output.in_features, self.output.out_features)
        states = self._states(x, context)
        return kernels.target_nats(self.logits, states, targets, chunk=chunk)

    def run(
        self, x: Float[Tensor, "batch bytes dim"], context: StackContext
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits of embedded ids in a context of packed rows or of a cache."""
        return self.logits(self._states(x, context))

    def _states(
        self, x: Float[Tensor, "batch bytes dim"], context: StackContext
    ) -> Float[Tensor, "batch bytes dim"]:
        for layer, block in enumerate(self.blocks):
            x = block(x, context[layer])
        return x

    def logits(self, x: Float[Tensor, "batch bytes dim"]) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the last block's states."""
        return self.output(self.norm(x)).float()
