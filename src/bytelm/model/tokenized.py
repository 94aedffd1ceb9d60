"""The baseline with a tokenizer: a plain transformer, and what turns text into its ids."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.model.transformer import Transformer
from bytelm.tokens import Tokenizer


class TokenModel(nn.Module):
    """A transformer over byte-pair tokens; token ids in, logits of the next token out."""

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer

    def forward(
        self,
        ids: Int[Tensor, "batch tokens"],
        documents: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits, in fp32, of the token after each.

        Args:
            ids: packed rows.
            documents: document of each token; ``None`` for one document a row.
        """
        return self.transformer(ids, documents)
