"""The application, to which commands are added, and its handling of errors."""

import io
import re
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from bytelm.errors import BytelmError
from bytelm.version import __version__

VERBS = [
    "quickstart",
    "data",
    "train",
    "eval",
    "patch",
    "generate",
    "study",
    "import",
    "export",
    "recipes",
    "flops",
]


class _InOrder(TyperGroup):
    """Command group that lists commands in the order in which they are needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return VERBS


app = typer.Typer(
    cls=_InOrder,
    name="bytelm",
    help="Byte-level language models built on the Byte Latent Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# No markup: names of files and sources may contain brackets.
console = Console(markup=False, highlight=False)


def main() -> None:
    """Run the command line; errors of the user are printed on one line, with status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Do not fail on characters that the terminal cannot show.
            stream.reconfigure(errors="replace")
    try:
        app()
    except BytelmError as error:
        _fail(str(error))
    except BrokenPipeError:
        # The reader closed the pipe.
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(
            f"{error.filename or 'the disk'}: {error.strerror or error}; check the path, its "
            "permissions and that the disk has room"
        )
    except (MemoryError, RuntimeError) as error:
        if not re.search("allocate|out of memory|^$", str(error)):
            raise
        _fail(
            "there is not enough memory: choose a smaller model, fewer rows at a time "
            "(train.micro_rows=1) or shorter ones (data.row_bytes)"
        )


def _fail(message: str) -> NoReturn:
    shown = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, highlight=False).print(shown, soft_wrap=True)
    sys.exit(1)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Byte-level language models built on the Byte Latent Transformer."""
    if version:
        print(__version__)
        raise typer.Exit
