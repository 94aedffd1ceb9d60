"""The page about the first hour names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = re.findall(
    r"`(test_\w+\.py)::(test_\w+)`", (TESTS.parent / "docs/first-hour.md").read_text()
)


def test_the_page_names_tests():
    assert len(NAMED) > 50


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_every_test_of_the_page_exists(module, name):
    tree = ast.parse((TESTS / module).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
