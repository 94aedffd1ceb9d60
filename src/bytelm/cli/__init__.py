"""The command line: verbs only. Each command's work is a function elsewhere.

Heavy modules are imported by the commands that need them: `--help` should not wait for torch.
"""

# Each of these adds its verbs to the app.
from bytelm.cli import convert, costs, data, models, study, tour
from bytelm.cli.app import app, main

__all__ = ["app", "convert", "costs", "data", "main", "models", "study", "tour"]
