"""Guard a run against steps whose loss is not finite or jumps."""

import math
from dataclasses import dataclass

from bytelm.config import TrainConfig
from bytelm.errors import TrainingError

MEMORY = 0.98
"""Weight of the average of the losses before, against that of a new loss."""


@dataclass
class Guard:
    """Decides whether a step's update is made; saved in checkpoints."""

    average: float | None = None
    """Running average of the loss of the updates that were made, in nats."""
    in_row: int = 0
    """Updates skipped one after the other."""
    skipped: int = 0
    """Updates skipped so far."""

    def admits(self, loss: float, norm: float, step: int, config: TrainConfig) -> bool:
        """Return whether to make the update of a step.

        ::

            max_rise 1     loss      3.0   2.9   4.5   2.8
                           average         3.0   3.0   3.0
                           update    yes   yes   no    yes

        Args:
            loss: loss of the step, in nats.
            norm: norm of its gradient.
            step: number of the step, for the message.
            config: settings of the guard.

        Raises:
            TrainingError: it must not be made, and more than ``max_skipped`` in a row were not.
        """
        problem = self._problem(loss, norm, config.max_rise)
        if problem is None:
            before = loss if self.average is None else self.average
            self.average = MEMORY * before + (1 - MEMORY) * loss
            self.in_row = 0
            return True
        if self.in_row == config.max_skipped:
            raise TrainingError(f"{problem} at step {step} (loss {loss}, gradient norm {norm})")
        self.in_row += 1
        self.skipped += 1
        return False

    def _problem(self, loss: float, norm: float, max_rise: float | None) -> str | None:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return "the loss is no longer finite"
        if max_rise is not None and self.average is not None and loss > self.average + max_rise:
            return f"the loss rose by more than train.max_rise={max_rise:g} nats"
        return None
