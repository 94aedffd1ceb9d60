"""Advice in errors: an option that the command lacks is named with the command that has it.

Errors are raised by parts that several commands share, so their advice may name an option of
another command. ``bytelm train`` turns "prepare it with --scorer" into "prepare it with --scorer of
`bytelm data prepare`".
"""

import re
from collections.abc import Sequence
from typing import Any

PREFERRED = "data prepare"
"""Command that is named first if several have an option."""
NO_MEMORY = {
    "train": "choose a smaller model, fewer rows at a time (train.micro_rows=1) or shorter ones "
    "(data.row_bytes)",
    "data prepare": "use fewer --workers, or cut long documents with --cut-bytes",
    "generate": "choose a smaller model or a shorter prompt, or fewer --slots for --prompts",
}
"""What to do if memory runs out, by command."""
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


def command_options(root: Any) -> dict[str, set[str]]:
    """Return the options of every command by the command's name, such as ``data prepare``."""
    found: dict[str, set[str]] = {}

    def visit(command: Any, path: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                visit(inner, (*path, name))
        else:
            flags = (o for p in command.params for o in (*p.opts, *p.secondary_opts))
            own = {o for o in flags if o.startswith("--")}
            found[" ".join(path)] = own | {"--help"}

    visit(root, ())
    return found


def command_of(arguments: Sequence[str], options: dict[str, set[str]]) -> str:
    """Return the name of the command that arguments call; empty if they call none."""
    for size in (2, 1):
        name = " ".join(arguments[:size])
        if name in options:
            return name
    return ""


def attribute_options(message: str, command: str, options: dict[str, set[str]]) -> str:
    """Return a message in which every option that the command lacks is said to be another's.

    Options within backticks are parts of whole commands, and stay as they are.
    """

    def owner(match: re.Match[str]) -> str:
        option = match[0]
        is_quoted = message.count("`", 0, match.start()) % 2 == 1
        owners = [name for name, own in options.items() if option in own]
        if is_quoted or command in owners or not owners:
            return option
        return f"{option} of `bytelm {PREFERRED if PREFERRED in owners else owners[0]}`"

    return _OPTION.sub(owner, message)
