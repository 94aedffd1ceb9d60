"""Text reaches the terminal as it is written, without markup and without control characters."""

import io
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

import bytelm
from bytelm.codec import to_bytes
from bytelm.config import StaticPatching
from bytelm.display import ConsoleProgress, show_likelihood, show_patches, show_study_costs
from bytelm.display.progress import Bar, TrainingBar
from bytelm.language_model import PatchedText
from bytelm.likelihood import Likelihood
from bytelm.study import plan_runs, run_costs
from bytelm.terminal import Terminal, escape_controls
from study_plan import plan

ANYTHING = st.text(st.characters() | st.sampled_from("[]/\\\x1b\x07\0\r\n\t|:\x9b\u202e\udcff"))
MARKUP = ["odd [/b] title", "my [draft] and [red] study", "a :bug: b", "[", "[/]", r"\[x]", "x\\"]


def unsafe(text):
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


def printed(show, **options):
    terminal = Terminal(file=io.StringIO(), width=500, **options)
    show(terminal)
    return terminal.file.getvalue()


@given(ANYTHING)
@example("a\x1b[31mred\x07\0")
def test_escaped_text_has_nothing_to_obey_and_keeps_the_rest(text):
    escaped = escape_controls(text)
    assert not unsafe(escaped)
    assert not re.search("[\u2028-\u202e\u2066-\u2069\ud800-\udfff]", escaped)
    assert escape_controls(escaped) == escaped
    safe = re.sub(r"[^ -~\n\t\u00a1-\u00ff]", "", text)
    assert escape_controls(safe) == safe
    escaped.encode()


def test_escapes_are_those_of_python():
    assert escape_controls("a\x1b[31mred\x07\0\n\t\x9b\u202e") == (
        "a\\x1b[31mred\\x07\\x00\n\t\\x9b\\u202e"
    )
    assert escape_controls("caf\udce9") == "caf\\xe9"  # a byte that is not UTF-8, in a file's name


def ways(text):
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    return {
        "text": lambda c: c.print(text, soft_wrap=True),
        "styled": lambda c: c.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True),
        "table": lambda c: c.print(table),
        "cell": lambda c: show_likelihood(c, {text: Likelihood(1.0, 1), "b": Likelihood(1.0, 1)}),
        "heading": lambda c: ConsoleProgress(c, 3).stage(text),
        "note": lambda c: ConsoleProgress(c).note(text),
        "bar": lambda c: fill(Bar(c, text, 3), text),
        "training": lambda c: finish(TrainingBar(c, text)),
        "waiting": lambda c: wait(ConsoleProgress(c), text),
    }


def fill(bar, figures):
    bar.update(3, figures)
    bar.stop()  # ends its thread, which Hypothesis would notice


def finish(bar):
    bar.on_begin(0, 2)
    bar.on_metrics(2, {"bpb": 1.0, "bytes_per_second": 1.0})
    bar.on_end()


def wait(progress, text):
    with progress.waiting(text):
        pass


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("way", ways(""))
def test_no_way_of_printing_obeys_text(way, is_terminal):
    @given(ANYTHING)
    @example("odd [/b] title")
    @example("\x1b[31m")
    def check(text):
        found = printed(ways(text)[way], force_terminal=is_terminal, no_color=True)
        # What Rich itself writes: styles, and the movements of bars.
        found = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r\n?", "", found)
        assert not unsafe(found)

    check()


@pytest.mark.parametrize("text", MARKUP)
@pytest.mark.parametrize("way", sorted(set(ways("")) - {"waiting"}))
def test_brackets_and_colons_are_printed_as_written(way, text):
    assert text in printed(ways(text)[way])


@pytest.mark.parametrize("text", MARKUP)
def test_titles_of_bars_are_shown_as_written_on_a_terminal(text):
    found = printed(lambda c: Bar(c, text, 3).stop(), force_terminal=True)
    assert text in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found)


@pytest.mark.parametrize("text", MARKUP)
def test_titles_of_plans_are_printed_as_written(text):
    one = plan(title=text)
    costs = run_costs(one, plan_runs(one)[:1], Path("/no"), 1e10)
    assert text in printed(lambda c: show_study_costs(c, one, costs, [0.5]))


# Patches


def patched(data, starts):
    return PatchedText(data, tuple(starts), None, StaticPatching(length=1))


PIECES = st.lists(st.sampled_from("ab|\\[]\x1b\x07\0\u00e9"), min_size=1).map("".join)


def read_back(shown):
    """The bytes and the boundaries that a line of patches with bars shows."""
    data, starts = b"", [0]
    for part in re.findall(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\[\\|]|\||[^\\|]", shown, re.DOTALL):
        if part == "|":
            starts.append(len(data))
        elif part[0] == "\\" and part[1] in "\\|":
            data += part[1].encode()
        elif part[0] == "\\":
            code = int(part[2:], 16)
            data += bytes([code]) if part[1] == "x" and code >= 0x80 else chr(code).encode()
        else:
            data += part.encode()
    return data, tuple(starts)


@given(st.lists(PIECES, min_size=1), st.booleans())
@example(["a\x1b[31mred\x07\0"], False)
@example(["a|b", "\\|", "\\x1b"], False)
def test_patches_can_be_read_back_from_what_is_printed(parts, is_bytes):
    pieces = [to_bytes(part) + (b"\xff" if is_bytes else b"") for part in parts]
    starts = [sum(map(len, pieces[:n])) for n in range(len(pieces))]
    shown = printed(lambda c: show_patches(c, patched(b"".join(pieces), starts)))
    line = shown[: shown.rindex("\n", 0, -1)]
    assert not unsafe(line)
    assert read_back(line) == (b"".join(pieces), tuple(starts))


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "info", "a\x1b[31m[/b]\x07"],
        ["train", "blt-1m", "model.dim=\x1b[31m"],
        ["generate", "x", "--precision", "\x1b[31m[/b]"],
        ["\x1b[31m[/b]"],
    ],
)
def test_errors_quote_what_was_typed_without_obeying_it(run, arguments):
    status, out, err = run(*arguments)
    assert status in (1, 2)
    assert not unsafe(err + out)
    assert "x1b[" in err
    assert "Traceback" not in err


def test_consoles_are_made_in_one_place():
    for path in Path(bytelm.__file__).parent.rglob("*.py"):
        if path.name != "terminal.py":
            assert not re.search(r"(?<!Terminal)\bConsole\((?!\w*Progress)", path.read_text()), path
