"""Evaluation: bits per byte."""

from bytelm.evaluation.likelihood import (
    Likelihood,
    Piece,
    batch_logits,
    dataset_pieces,
    evaluate,
    evaluate_pieces,
    position_nats,
    total,
)

__all__ = [
    "Likelihood",
    "Piece",
    "batch_logits",
    "dataset_pieces",
    "evaluate",
    "evaluate_pieces",
    "position_nats",
    "total",
]
