"""Evaluation: bits per byte."""

from bytelm.evaluation.likelihood import evaluate
from bytelm.training.objective import Likelihood, total

__all__ = ["Likelihood", "evaluate", "total"]
