"""The harness's own command, with the model type ``bytelm`` and the tasks of local files."""

import sys

from lm_eval.__main__ import cli_evaluate

from bytelm.evaluation.harness.local import TASKS


def with_local_tasks(arguments: list[str]) -> list[str]:
    """Return arguments that let tasks be those of local files, unless others are included."""
    if "--tasks" not in arguments or any(one.startswith("--include_path") for one in arguments):
        return arguments
    return [*arguments, "--include_path", str(TASKS)]


if __name__ == "__main__":
    sys.argv[1:] = with_local_tasks(sys.argv[1:])
    cli_evaluate()
