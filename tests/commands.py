"""The command line in the process of the tests: a process of its own takes seconds to begin."""

import io
import sys
from types import SimpleNamespace

import pytest


def invoke(*arguments, stdin=b""):
    """Run a command; return its exit status."""
    from bytelm import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bytelm", *map(str, arguments)])
        if stdin:
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        try:
            cli.main()
        except SystemExit as error:
            return error.code
    return 0
