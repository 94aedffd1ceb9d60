"""Part `plain`: a transformer with the global model's shape over bytes, trained likewise."""

from benchmarks.parts.models import plain_config
from benchmarks.parts.notes import Notes, Target
from benchmarks.parts.training import train


def run(target: Target, notes: Notes) -> None:
    """The plain transformer."""
    train(target, notes, [plain_config(target)])
