"""The application, to which commands are added, and its handling of errors."""

import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text
from typer.core import TyperGroup

from bytelm.cli.advice import NO_MEMORY, attribute_options, command_of, command_options
from bytelm.errors import BytelmError
from bytelm.ranks import find_place
from bytelm.stopping import SAME_SECONDS, SIGNALS, Stopped, is_importing
from bytelm.storage import at_home
from bytelm.terminal import Terminal, escape_controls
from bytelm.version import __version__

VERBS = [
    "quickstart",
    "data",
    "train",
    "eval",
    "patch",
    "generate",
    "serve",
    "study",
    "byteify",
    "distil",
    "import",
    "export",
    "recipes",
    "flops",
    "plan",
]


class _Commands(TyperGroup):
    """The commands, listed in the order in which they are needed, and ended by signals."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options of the group; see :func:`_readable`."""
        with _readable():
            return super().make_context(*arguments, **options)

    def list_commands(self, ctx: Any) -> list[str]:
        return VERBS

    def invoke(self, ctx: Any) -> Any:
        try:
            with _readable():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if find_place().rank == 0:
                print(_stopped(str(stop)), file=sys.stderr)
            raise typer.Exit(128 + _interrupts.number) from None


class App(typer.Typer):
    """An application in whose paths ``~`` is the home folder: shells leave ``--out=~/x`` alone."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[Any], Any]:
        """Add a command."""
        add = super().command(*arguments, **options)

        def register(function: Any) -> Any:
            @wraps(function)
            def run(**values: Any) -> None:
                for name, value in values.items():
                    if isinstance(value, Path):
                        values[name] = at_home(value)
                function(**values)

            add(run)
            return function

        return register


class _Interrupts:
    """Handler of signals that interrupts the command in progress."""

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        """The last signal."""
        self._last = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        is_repeated, self._last = now - self._last < SAME_SECONDS, now
        if is_repeated:
            return
        self.number = number
        if is_importing(frame):
            # Nothing has begun that would have to be ended, and exceptions can abort imports.
            sys.stdout.flush()
            os.write(2, f"{_stopped()}\n".encode())
            os._exit(128 + number)
        raise KeyboardInterrupt


_interrupts = _Interrupts()
RESUMES = "the same command resumes"


def _stopped(advice: str = "") -> str:
    return f"stopped: {RESUMES}" if advice == RESUMES else "stopped"


@contextmanager
def resumable() -> Iterator[None]:
    """Say that the same command resumes if the block is interrupted."""
    try:
        yield
    except Stopped as stop:
        # Training has its own handler of signals; a time limit is none.
        if str(stop) in signal.Signals.__members__:
            _interrupts.number = int(signal.Signals[str(stop)])
        raise KeyboardInterrupt(RESUMES) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(RESUMES) from None


@contextmanager
def _readable() -> Iterator[None]:
    """Escape control characters in the messages of wrong options, which Typer prints."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if isinstance(message, str) and hasattr(error, "format_message"):
            error.message = escape_controls(message)  # pyright: ignore[reportAttributeAccessIssue]
        raise


app = App(
    cls=_Commands,
    name="bytelm",
    help="Byte-level language models built on the Byte Latent Transformer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

console = Terminal()
"""Standard output."""
status = Terminal(stderr=True)
"""Standard error, for progress while standard output may hold JSON."""


def main() -> None:
    """Run the command line; errors of the user are printed on one line, with status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Do not fail on characters that the terminal cannot show.
            stream.reconfigure(errors="replace")
    handlers = {n: signal.getsignal(n) for n in SIGNALS}
    for number, handler in handlers.items():
        # A shell may have had SIGINT ignored, for commands in the background.
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupts)
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
        command = command_of(sys.argv[1:], _options())
        advice = NO_MEMORY.get(command, "choose a smaller model, or less text at a time")
        _fail(f"there is not enough memory: {advice}")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _options() -> dict[str, set[str]]:
    return command_options(typer.main.get_command(app))


def _fail(message: str) -> NoReturn:
    if find_place().rank > 0:
        # All ranks have the error; the first prints it.
        sys.exit(1)
    options = _options()
    message = attribute_options(message, command_of(sys.argv[1:], options), options)
    shown = Text.assemble(("error: ", "bold red"), message)
    Terminal(stderr=True).print(shown, soft_wrap=True)
    sys.exit(1)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Byte-level language models built on the Byte Latent Transformer."""
    if version:
        print(__version__)
        raise typer.Exit
