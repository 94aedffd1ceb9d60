"""Reading of inputs: options, the same for every command that reads text, and progress."""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from bytelm.data import Document, Input, Reader

FormatOption = Annotated[
    Literal["auto", "text", "lines", "json", "jsonl", "parquet"],
    typer.Option(
        help="auto: by name and content; text: each file is a document; lines: each line is; "
        "jsonl: each line is a record; json: also one array of records."
    ),
]
OPTIONS: dict[str, tuple[Any, Any]] = {
    "format": (FormatOption, "auto"),
    "field": (
        Annotated[
            str,
            typer.Option(
                help="Field or column with the text; doc.text is a nested one. Of several "
                "(prompt,response) the last is trained on; of a list of messages, the assistant's."
            ),
        ],
        "text",
    ),
    "source_field": (
        Annotated[
            str | None,
            typer.Option(help="Field or column that names the source; labels give their names."),
        ],
        None,
    ),
    "include": (
        Annotated[str | None, typer.Option(help="Glob for files in folders, such as '*.py'.")],
        None,
    ),
    "binary": (
        Annotated[
            bool,
            typer.Option(
                "--binary",
                help="Also read binary files and archives found in folders, as bytes; UTF-16 and "
                "UTF-32 are not converted.",
            ),
        ],
        False,
    ),
    "skip_invalid": (
        Annotated[
            bool,
            typer.Option(
                "--skip-invalid",
                help="Skip records that cannot be read, and the rest of damaged files.",
            ),
        ],
        False,
    ),
    "cut_bytes": (
        Annotated[
            int | None,
            typer.Option(min=1, help="Cut longer documents into parts, at line ends if possible."),
        ],
        None,
    ),
}
"""Type and default of each option, by its name in :class:`bytelm.data.ReadOptions`."""


def with_read_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``read`` of a command by the options that make it."""

    @wraps(command)
    def run(**arguments: Any) -> None:
        from bytelm.data import ReadOptions

        read = ReadOptions(**{name: arguments.pop(name) for name in OPTIONS})
        command(**arguments, read=read)

    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        if parameter.name == "read":
            parameters += [
                inspect.Parameter(name, parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for name, (kind, default) in OPTIONS.items()
            ]
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    setattr(run, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    return run


class HeldOutText:
    """Iterator over the documents of inputs that are not for training; it estimates how many bytes.

    Args:
        inputs: what to read.
        reader: reads it.
    """

    def __init__(self, inputs: "list[Input]", reader: "Reader") -> None:
        self._inputs, self._reader = inputs, reader
        self._total = sum(one.num_bytes for one in inputs if one.is_read)
        self._position = self._text_bytes = 0

    def __iter__(self) -> "Iterator[Document]":
        before = 0
        for one in self._inputs:
            for document in self._reader.read(one):
                self._position = before + min(self._reader.position, one.num_bytes)
                if document.split != "train":
                    self._text_bytes += len(document.data)
                    yield document
            before += one.num_bytes if one.is_read else 0
        self._position = self._total

    @property
    def expected_bytes(self) -> int | None:
        """Bytes of text in all inputs, if the rest is like what was read; ``None`` for pipes."""
        if not self._position or not self._total:
            return None
        return round(self._text_bytes * max(self._total / self._position, 1.0))
