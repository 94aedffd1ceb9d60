"""Models from their descriptions."""

from bytelm.config import BLTConfig, ModelDescription, ScorerConfig, TableConfig, TransformerConfig
from bytelm.model.blt import BLT
from bytelm.model.ngram import NgramScorer
from bytelm.model.patched import PatchedModel
from bytelm.model.scorers import TransformerScorer
from bytelm.model.tokenized import TokenModel
from bytelm.model.transformer import Transformer
from bytelm.patching import build_patcher

LanguageModule = PatchedModel | Transformer | TokenModel
"""What can be asked for logits."""
ScorerModule = TransformerScorer | NgramScorer
"""What can be asked for entropies."""


def build_scorer(config: ScorerConfig) -> ScorerModule:
    """A scorer without its weights."""
    if isinstance(config.model, TableConfig):
        return NgramScorer(
            max_order=config.model.max_order,
            num_contexts=config.model.num_contexts,
            reset_at_newline=config.reset_at_newline,
        )
    return TransformerScorer(Transformer(config.model), reset_at_newline=config.reset_at_newline)


def build_model(description: ModelDescription) -> LanguageModule | NgramScorer:
    """A model without its weights.

    Raises:
        PatchingError: its patching rule has not been calibrated.
    """
    match description.model:
        case TransformerConfig():
            return Transformer(description.model)
        case TableConfig():
            return NgramScorer(
                max_order=description.model.max_order, num_contexts=description.model.num_contexts
            )
        case BLTConfig():
            assert description.patching is not None
            scorer = build_scorer(description.scorer) if description.scorer else None
            patcher = build_patcher(description.patching)
            return PatchedModel(BLT(description.model), patcher, scorer)
