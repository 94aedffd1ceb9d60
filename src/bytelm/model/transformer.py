"""The plain transformer, used as entropy model and for the byte and token baselines."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.config import TransformerConfig
from bytelm.model.attention import RMSNorm, StackContext, StackSpec
from bytelm.model.embedding import HashEmbedding
from bytelm.model.layers import build_blocks, init_stack
from bytelm.patching import row_positions


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
        """Initialise as :func:`~bytelm.model.layers.init_stack` does."""
        init_stack(self, generator)

    def forward(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the id after each.

        Args:
            ids: packed rows.
            documents: document of each id; ``None`` for one document per row.
        """
        if documents is None:
            documents = torch.zeros_like(ids)
        positions = row_positions(documents)
        return self.run(self.embedding(ids, positions), self.spec.over_rows(documents, positions))

    def run(
        self, x: Float[Tensor, "batch bytes dim"], context: StackContext
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits of embedded ids in a context of packed rows or of a cache."""
        for layer, block in enumerate(self.blocks):
            x = block(x, context[layer])
        return self.logits(x)

    def logits(self, x: Float[Tensor, "batch bytes dim"]) -> Float[Tensor, "batch bytes vocab"]:
        """Return the logits, in fp32, of the last block's states."""
        return self.output(self.norm(x)).float()
