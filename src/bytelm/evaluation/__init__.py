"""Evaluation: bits per byte."""

from bytelm.evaluation.likelihood import Labelled, evaluate
from bytelm.training.objective import Likelihood, total

__all__ = ["Labelled", "Likelihood", "evaluate", "total"]
