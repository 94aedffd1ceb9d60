"""Errors name only options that their command has, or say whose they are."""

import ast
import re
from pathlib import Path

import pytest
import typer

import bytelm
from bytelm.cli import app
from bytelm.cli.advice import attribute_options, command_of, command_options

OPTIONS = command_options(typer.main.get_command(app))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
ROOT = Path(bytelm.__file__).parent


def messages():
    """Texts outside docstrings and the command line that mention options, with where they are."""
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] == "cli":
            continue
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inside = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            text = None
            if isinstance(node, ast.JoinedStr):
                text = "".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = None if id(node) in docs | inside else node.value
            if text and OPTION.search(text):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", text


MESSAGES = dict(messages())


def unattributed(message):
    """Options of a message that are neither in backticks nor said to be another command's."""
    return set(OPTION.findall(re.sub(r"`[^`]*`|--[\w-]+ of `bytelm [^`]*`", "", message)))


def test_the_texts_of_the_package_are_found():
    assert any("--skip-invalid" in text for text in MESSAGES.values())
    assert {"quickstart", "data prepare", "eval", "import official"} <= OPTIONS.keys()
    assert "--skip-invalid" in OPTIONS["data prepare"]


@pytest.mark.parametrize("where", MESSAGES)
def test_every_option_that_a_message_names_exists(where):
    known = set().union(*OPTIONS.values())
    # Commands in backticks may be of other programs: `zstd -d --long=31`.
    text = re.sub(r"`(?!bytelm )[^`]* [^`]*`", "", MESSAGES[where])
    assert set(OPTION.findall(text)) <= known


@pytest.mark.parametrize("command", OPTIONS)
def test_no_command_advises_options_that_it_lacks(command):
    for where, text in MESSAGES.items():
        shown = attribute_options(text, command, OPTIONS)
        assert unattributed(shown) <= OPTIONS[command], where
        # What the command has is left as it is.
        assert set(OPTION.findall(shown)) == set(OPTION.findall(text))
        if set(OPTION.findall(text)) <= OPTIONS[command]:
            assert shown == text


def test_options_in_whole_commands_are_left_as_they_are():
    text = "run `bytelm data prepare X --out Y`, or choose another --out, or --skip-invalid"
    assert attribute_options(text, "patch", OPTIONS) == (
        "run `bytelm data prepare X --out Y`, or choose another --out of `bytelm data prepare`, or "
        "--skip-invalid of `bytelm data prepare`"
    )
    assert attribute_options(text, "data prepare", OPTIONS) == text
    assert attribute_options("--unknown", "eval", OPTIONS) == "--unknown"


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["data", "prepare", "x"], "data prepare"),
        (["eval", "data", "prepare"], "eval"),
        (["eval"], "eval"),
        (["data"], ""),
        ([], ""),
        (["nothing"], ""),
    ],
)
def test_the_command_is_found_in_the_arguments(arguments, command):
    assert command_of(arguments, OPTIONS) == command


def test_quickstart_advises_options_of_the_command_that_has_them(run, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\nnot json\n')
    monkeypatch.chdir(tmp_path)
    status, _, err = run("quickstart", "--data", "x.jsonl")
    assert status == 1
    assert unattributed(err) <= OPTIONS["quickstart"]
    assert "--skip-invalid of `bytelm data prepare`" in err
