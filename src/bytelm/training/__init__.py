"""Training of language models and n-gram scorers."""

from bytelm.training.counting import fit_ngrams
from bytelm.training.flops import Stretches, full_step_flops, mean_step_flops, sample_stretches
from bytelm.training.objective import (
    LabelledSpan,
    Likelihood,
    measure_spans,
    position_nats,
    total,
)
from bytelm.training.optim import build_optimizer, learning_rate
from bytelm.training.parallel import parallelize
from bytelm.training.rows import with_room
from bytelm.training.run import Run, TrainingResult, open_run, train
from bytelm.training.setup import resolve
from bytelm.training.starting import recorded_recipe
from bytelm.training.state import charges_full_rows, recorded_threads
from bytelm.training.trainer import Trainer
from bytelm.training.turns import Turns, train_in_turns
from bytelm.training.validation import held_out_spans

__all__ = [
    "LabelledSpan",
    "Likelihood",
    "Run",
    "Stretches",
    "Trainer",
    "TrainingResult",
    "Turns",
    "build_optimizer",
    "charges_full_rows",
    "fit_ngrams",
    "full_step_flops",
    "held_out_spans",
    "learning_rate",
    "mean_step_flops",
    "measure_spans",
    "open_run",
    "parallelize",
    "position_nats",
    "recorded_recipe",
    "recorded_threads",
    "resolve",
    "sample_stretches",
    "total",
    "train",
    "train_in_turns",
    "with_room",
]
