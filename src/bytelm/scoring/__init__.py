"""Scorers, which compute the next-byte entropies that patching rules compare."""

from bytelm.scoring.building import build_scorer, register_scorer
from bytelm.scoring.context import ContextScorer
from bytelm.scoring.documents import (
    check_entropies,
    group_by_size,
    score_document,
    score_documents,
)
from bytelm.scoring.ngram import NgramScorer, fit_ngram_scorer
from bytelm.scoring.transformer import TransformerScorer

__all__ = [
    "ContextScorer",
    "NgramScorer",
    "TransformerScorer",
    "build_scorer",
    "check_entropies",
    "fit_ngram_scorer",
    "group_by_size",
    "register_scorer",
    "score_document",
    "score_documents",
]
