"""Training of language models and n-gram scorers."""

from bytelm.training.counting import fit_ngrams
from bytelm.training.objective import (
    LabelledSpan,
    Likelihood,
    measure_spans,
    position_nats,
    total,
)
from bytelm.training.optim import build_optimizer, learning_rate
from bytelm.training.parallel import parallelize
from bytelm.training.run import Run, TrainingResult, open_run, train
from bytelm.training.setup import resolve, with_room
from bytelm.training.state import recorded_threads
from bytelm.training.trainer import Trainer, step_flops
from bytelm.training.turns import Turns, train_in_turns
from bytelm.training.validation import held_out_spans

__all__ = [
    "LabelledSpan",
    "Likelihood",
    "Run",
    "Trainer",
    "TrainingResult",
    "Turns",
    "build_optimizer",
    "fit_ngrams",
    "held_out_spans",
    "learning_rate",
    "measure_spans",
    "open_run",
    "parallelize",
    "position_nats",
    "recorded_threads",
    "resolve",
    "step_flops",
    "total",
    "train",
    "train_in_turns",
    "with_room",
]
