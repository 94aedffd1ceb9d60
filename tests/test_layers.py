"""Imports point one way: a module imports only from the layers before its own, or its own."""

import ast
from pathlib import Path

import bytelm

LAYERS = [
    {"errors", "version"},
    {"codec", "progress", "slots", "stopping", "storage", "terminal"},
    {"cluster", "layout", "ranks", "shards", "threads", "workers"},
    {"chat", "config", "tokens", "tracking"},
    {"kernels", "patching"},
    {"model", "units"},
    {"cpu"},
    {"inference"},
    {"scoring"},
    {"lm"},
    {"accounting", "checkpoint"},
    {"data"},
    {"training"},
    {"likelihood", "patched_text"},
    {"language_model"},
    {"figures", "interop", "prompts", "workflow"},
    {"evaluation"},
    {"byteify", "quickstart", "study"},
    {"serving"},
    {"display"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ROOT = Path(bytelm.__file__).parent
# The package itself and its entry point sit above everything; recipes are data.
TOP = {"__init__", "__main__"}


def component(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("bytelm."):
                yield name.split(".")[1]


def test_every_module_has_a_layer():
    found = {component(p) for p in ROOT.rglob("*.py")}
    assert found - TOP - {"recipes", "plans"} <= set(RANK)


def test_imports_point_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        source = component(path)
        if source in TOP:
            continue
        for target in imports(path):
            if target in RANK and target != source and RANK[target] >= RANK[source]:
                wrong.append(f"{path.relative_to(ROOT)} imports bytelm.{target}")
    assert not wrong


def test_no_module_is_named_for_nothing():
    names = {p.stem for p in ROOT.rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def body_lines(function):
    first = function.body[1] if len(function.body) > 1 else function.body[0]  # after the docstring
    return function.end_lineno - first.lineno + 1


def test_files_and_functions_stay_short():
    long = []
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if len(text.splitlines()) > 500:
            long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and body_lines(node) > 60:
                long.append(f"{path}: {node.name}")
    assert not long
