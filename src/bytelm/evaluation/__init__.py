"""Evaluation: bits per byte, and log-probabilities of bytes and of continuations."""

from bytelm.evaluation.likelihood import Labelled, evaluate, log_likelihoods, log_probs
from bytelm.training.objective import Likelihood, total

__all__ = ["Labelled", "Likelihood", "evaluate", "log_likelihoods", "log_probs", "total"]
