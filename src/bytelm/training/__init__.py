"""Training."""

from bytelm.training.optim import build_optimizer, learning_rate
from bytelm.training.run import TrainingResult, train
from bytelm.training.setup import settle, with_room
from bytelm.training.table import fit_table
from bytelm.training.timing import StepCost, step_cost
from bytelm.training.trainer import Trainer, step_flops

__all__ = [
    "StepCost",
    "Trainer",
    "TrainingResult",
    "build_optimizer",
    "fit_table",
    "learning_rate",
    "settle",
    "step_cost",
    "step_flops",
    "train",
    "with_room",
]
