"""The plain transformer: entropy model and both baselines are this one class."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm import kernels
from bytelm.config import StackConfig, TransformerConfig
from bytelm.model.attention import Context, StackSpec
from bytelm.model.embedding import NgramEmbedding
from bytelm.model.layers import Block, init_stack
from bytelm.patching import row_positions


def build_blocks(config: StackConfig) -> nn.ModuleList:
    """The blocks of a stack."""
    return nn.ModuleList(
        Block(dim=config.dim, hidden_dim=config.ffn_dim) for _ in range(config.num_layers)
    )


def stack_spec(config: StackConfig, window: int | None) -> StackSpec:
    """What attention needs to know of a stack."""
    head_dim = config.dim // config.num_heads
    return StackSpec(config.num_layers, head_dim, config.rope_theta, window)


class Transformer(nn.Module):
    """Embedding, blocks, norm, output matrix; ids in, logits of the next id out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.spec = stack_spec(config, config.window)
        self.embedding = NgramEmbedding(
            vocab_size=config.vocab_size, dim=config.dim, config=config.ngrams
        )
        self.blocks = build_blocks(config)
        self.norm = nn.RMSNorm(config.dim, eps=kernels.NORM_EPS)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Matrices as :func:`~bytelm.model.layers.init_stack` has them; norms are 1."""
        init_stack(self, generator)

    def forward(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Logits, in fp32, of the id after each.

        Args:
            ids: packed rows.
            documents: document of each byte; ``None`` for one document a row.
        """
        if documents is None:
            documents = torch.zeros_like(ids)
        positions = row_positions(documents)
        return self.run(self.embedding(ids, positions), self.spec.over_rows(documents, positions))

    def run(
        self, x: Float[Tensor, "batch bytes dim"], context: Context
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Logits of embedded ids in any context: packed rows, or more of a cached document."""
        for layer, block in enumerate(self.blocks):
            x = block(x, context.factors, context.attend(layer))
        return kernels.norm_linear(x, self.norm.weight, self.output.weight).float()
