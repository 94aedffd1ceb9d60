"""The command line: options and output of the commands, whose work is done elsewhere.

Commands import heavy modules when they run, so that `--help` does not wait for torch.
"""

# Each of these modules adds its commands to the app.
from bytelm.cli import (
    byteify,
    convert,
    costs,
    data,
    distil,
    evaluating,
    models,
    serving,
    study,
    tour,
)
from bytelm.cli.app import app, main

__all__ = [
    "app",
    "byteify",
    "convert",
    "costs",
    "data",
    "distil",
    "evaluating",
    "main",
    "models",
    "serving",
    "study",
    "tour",
]
