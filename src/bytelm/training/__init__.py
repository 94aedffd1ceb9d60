"""Training."""

from bytelm.training.optim import build_optimizer, learning_rate
from bytelm.training.table import fit_table
from bytelm.training.trainer import TrainingResult, train

__all__ = ["TrainingResult", "build_optimizer", "fit_table", "learning_rate", "train"]
